#include <algorithm>

#include "contracts/ring.h"
#include "cuda/device.h"
#include "ring.cuh"

namespace vmemory::ring {
namespace {

// whether rows of `bytes` may be moved in 16-byte units
bool aligned(int64_t bytes, std::initializer_list<const void*> pointers) {
  if (bytes % sizeof(uint4)) return false;
  return std::all_of(pointers.begin(), pointers.end(),
                     [](const void* p) { return reinterpret_cast<uintptr_t>(p) % sizeof(uint4) == 0; });
}

template <class Unit>
void push(const Device& device, const Tensor& slots, const Tensor& count, const Tensor& frames,
          const int64_t* streams) {
  const int64_t rows = frames.size(0), T = frames.size(1), M = slots.size(1), last = std::min(T, M);
  const int64_t bytes = slots.size(2) * slots.size(3) * slots.element_size();
  const int64_t units = bytes / static_cast<int64_t>(sizeof(Unit)), pieces = pieces_of(units);
  const int64_t blocks = std::max<int64_t>(1, last * pieces);
  VMEMORY_CHECK(rows * blocks <= INT32_MAX, "frames: too many for one launch");
  const Tensor arrived = make(count, {rows}, ScalarType::Int);
  device.clear(arrived);
  PushArgs<Unit> args{mutable_data<Unit>(slots),
                      mutable_data<int64_t>(count),
                      data<Unit>(frames),
                      streams,
                      mutable_data<unsigned>(arrived),
                      slots.size(0),
                      M,
                      T,
                      last,
                      units,
                      pieces,
                      blocks};
  device.launch("ring_push_", &ring_push_kernel<Unit>, dim3(static_cast<unsigned>(rows * blocks)), kThreads, 0, args);
}

void ring_push_(const Tensor& slots, const Tensor& count, const Tensor& frames_, std::optional<Tensor> streams_) {
  contract::ring_push_(slots, count, frames_, streams_);
  const Device device(slots);
  const Tensor frames = dense(frames_), streams = streams_ ? dense(*streams_) : count;
  if (frames.size(0) == 0 || frames.size(1) == 0) return;
  const int64_t bytes = slots.size(2) * slots.size(3) * slots.element_size();
  const int64_t* route = streams_ ? data<int64_t>(streams) : nullptr;
  if (aligned(bytes, {slots.const_data_ptr(), frames.const_data_ptr()})) {
    push<uint4>(device, slots, count, frames, route);
  } else {
    push<uint16_t>(device, slots, count, frames, route);
  }
}

template <class T, int V, bool kMean>
void replace(const Device& device, const ReplaceArgs<T>& args) {
  const auto kernel = &slot_replace_kernel<T, V, kMean>;
  const int64_t slices = kMean ? (args.D + kWarp * V - 1) / (kWarp * V) : 0;
  const int64_t items =
      std::max({args.rows * args.each * slices, args.rows * (args.M + 1) * args.chunks, args.rows * args.pieces});
  const int64_t blocks = std::min(items, device.resident_blocks(kernel, kThreads, 0));
  device.launch_together("slot_replace_", kernel, dim3(static_cast<unsigned>(blocks)), kThreads, 0, args);
}

Tensor slot_replace_(const Tensor& slots, const Tensor& count, std::optional<Tensor> means, const Tensor& frames_,
                     std::optional<Tensor> streams_, std::string level) {
  contract::slot_replace_(slots, count, means, frames_, streams_, level);
  const Device device(slots);
  const Tensor frames = dense(frames_), streams = streams_ ? dense(*streams_) : count;
  const int64_t rows = frames.size(0), S = slots.size(0), M = slots.size(1), N = slots.size(2), D = slots.size(3);
  Tensor replaced = make(count, {rows});
  if (rows == 0) return replaced;
  const bool whole = level == "flat";
  const int64_t each = whole ? 0 : (means ? 1 : M + 1), size = whole ? N * D : D;
  const int64_t chunks = std::max<int64_t>(1, (size + kChunk - 1) / kChunk);
  const ScalarType wide = slots.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const Tensor mean = make(slots, {rows, each, D}, wide), part = make(slots, {rows, M + 1, chunks, 2}, wide);
  const Tensor written = make(count, {rows});
  dispatch_floating(slots.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    using A = acc_t<T>;
    constexpr int V = sizeof(uint4) / sizeof(T);
    ReplaceArgs<T> args{mutable_data<T>(slots),
                        mutable_data<int64_t>(count),
                        mutable_data<int64_t>(replaced),
                        means ? mutable_data<A>(*means) : nullptr,
                        data<T>(frames),
                        streams_ ? data<int64_t>(streams) : nullptr,
                        mutable_data<A>(mean),
                        mutable_data<A>(part),
                        mutable_data<int64_t>(written),
                        rows,
                        S,
                        M,
                        N,
                        D,
                        each,
                        chunks,
                        1};
    // rows of means and whole frames alike begin at multiples of 16 bytes
    const bool units = aligned(D * sizeof(T), {args.slots, args.frames});
    args.pieces = pieces_of(N * D / (units ? V : 1));
    if (units) {
      whole ? replace<T, V, false>(device, args) : replace<T, V, true>(device, args);
    } else {
      whole ? replace<T, 1, false>(device, args) : replace<T, 1, true>(device, args);
    }
  });
  return replaced;
}

}  // namespace
}  // namespace vmemory::ring

VMEMORY_CUDA_IMPL(m) {
  m.impl("ring_push_", TORCH_BOX(&vmemory::ring::ring_push_));
  m.impl("slot_replace_", TORCH_BOX(&vmemory::ring::slot_replace_));
}
