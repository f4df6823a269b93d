#include <algorithm>

#include "bank_plan.cuh"
#include "contracts/bank.h"
#include "cuda/device.h"

namespace vmemory::bank {
namespace {

constexpr int64_t kMaxShared = 48 << 10;  // available on every device without a request

// the kernel for 16-byte accesses where addresses and rows allow them, else the one for single elements
template <class T>
bool aligned(int64_t D, std::initializer_list<const void*> pointers) {
  if (D * sizeof(T) % sizeof(uint4)) return false;
  return std::all_of(pointers.begin(), pointers.end(),
                     [](const void* p) { return reinterpret_cast<uintptr_t>(p) % sizeof(uint4) == 0; });
}

template <class Args>
void launch(const Device& device, const char* what, void (*kernel)(Args), int64_t blocks, size_t shared,
            const Args& args) {
  VMEMORY_CHECK(blocks <= INT32_MAX, what, ": too many frames and channels for one launch");
  VMEMORY_CHECK(shared <= kMaxShared, what, ": a frame of this grid needs ", shared, " bytes of shared memory");
  device.launch(what, kernel, dim3(static_cast<unsigned>(blocks)), kThreads, shared, args);
}

int64_t slices_of(int64_t channels) { return (channels + kSlice - 1) / kSlice; }

AxisTable push_axes(const Geometry& g, const MapOffsets& maps) {
  AxisTable axes;
  for (int tier = 0; tier + 1 < g.tiers; ++tier) {
    axes.add(maps.step_rows[tier], g.height[tier], g.height[tier + 1]);
    axes.add(maps.step_columns[tier], g.width[tier], g.width[tier + 1]);
  }
  for (int tier = 0; tier < g.tiers; ++tier) {
    axes.add(maps.rows[tier][tier], g.H, g.height[tier]);
    axes.add(maps.columns[tier][tier], g.W, g.width[tier]);
  }
  return axes;
}

Tensor bank_decide(const Tensor& norm, const Tensor& link, const Tensor& entry, const Tensor& order,
                   const Tensor& counter, std::optional<Tensor> streams_, std::optional<Tensor> victim_,
                   Ints capacities, Ints grids, Ints intervals, Ints entries, Ints rule) {
  const Geometry g = contract::bank_decide(norm, link, entry, order, counter, streams_, victim_,
                                           {capacities, grids, intervals, entries, rule});
  const Device device(order);
  const Tensor streams = streams_ ? dense(*streams_) : counter, victim = victim_ ? dense(*victim_) : counter;
  const int64_t S = streams.size(0);
  Tensor out = make(order, {S, kStepHead + 2 * g.tiers});
  dispatch_floating(norm.scalar_type(), [&](auto t) {
    using A = acc_t<typename decltype(t)::type>;
    DecideArgs<A> args{g,
                       data<A>(norm),
                       data<A>(link),
                       data<int64_t>(entry),
                       data<int64_t>(order),
                       data<int64_t>(counter),
                       streams_ ? data<int64_t>(streams) : nullptr,
                       victim_ ? data<int64_t>(victim) : nullptr,
                       mutable_data<int64_t>(out),
                       counter.size(0)};
    if (S > 0) launch(device, "bank_decide", &decide_kernel<A>, S, sizeof(Work<A>), args);
  });
  return out;
}

void bank_push_(const Tensor& slots, const Tensor& mass, const Tensor& descriptor, const Tensor& norm,
                const Tensor& link, const Tensor& entry, const Tensor& clock, const Tensor& order,
                const Tensor& counter, const Tensor& scale, const Tensor& frames_, std::optional<Tensor> time_,
                std::optional<Tensor> valid_, std::optional<Tensor> streams_, std::optional<Tensor> victim_,
                const Tensor& table_, Ints capacities, Ints grids, Ints intervals, Ints entries, Ints rule) {
  const Geometry g =
      contract::bank_push_(slots, mass, descriptor, norm, link, entry, clock, order, counter, scale, frames_, time_,
                           valid_, streams_, victim_, table_, {capacities, grids, intervals, entries, rule});
  VMEMORY_CHECK(slots.scalar_type() == frames_.scalar_type(), "slots: expected the dtype of frames, got few bits");
  const Device device(frames_);
  const Tensor frames = dense(frames_), table = dense(table_);
  const Tensor time = time_ ? dense(*time_) : frames, valid = valid_ ? dense(*valid_) : frames;
  const Tensor streams = streams_ ? dense(*streams_) : frames, victim = victim_ ? dense(*victim_) : frames;
  const int64_t S = frames.size(0), N = frames.size(1), H = frames.size(2), W = frames.size(3), D = frames.size(4);
  const MapOffsets maps(g);
  const int64_t items = push_items(g), key_slices = slices_of(g.K);
  const Tensor partial = make(table, {S, items, key_slices}), arrived = make(order, {S}, ScalarType::Int);
  device.clear(arrived);
  dispatch_floating(frames.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    using A = acc_t<T>;
    constexpr int V = sizeof(uint4) / sizeof(T);
    PushArgs<T> args{g,
                     maps,
                     push_axes(g, maps),
                     mutable_data<T>(slots),
                     mutable_data<float>(mass),
                     mutable_data<A>(descriptor),
                     mutable_data<A>(norm),
                     mutable_data<A>(link),
                     mutable_data<int64_t>(entry),
                     mutable_data<double>(clock),
                     mutable_data<int64_t>(order),
                     mutable_data<int64_t>(counter),
                     data<T>(frames),
                     time_ ? data<double>(time) : nullptr,
                     valid_ ? data<bool>(valid) : nullptr,
                     streams_ ? data<int64_t>(streams) : nullptr,
                     victim_ ? data<int64_t>(victim) : nullptr,
                     data<A>(table),
                     mutable_data<A>(partial),
                     mutable_data<unsigned>(arrived),
                     std::max<int64_t>(1, slices_of(D)),
                     key_slices,
                     items,
                     slots.size(0),
                     0,
                     N};
    const auto kernel = aligned<T>(D, {args.slots, args.frames}) ? push_kernel<T, V> : push_kernel<T, 1>;
    const size_t shared = PushShared<A>::bytes(g, args.axes);
    for (; args.frame < N; ++args.frame) launch(device, "bank_push_", kernel, S * args.slices, shared, args);
  });
}

using Plan = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Plan bank_plan(const Tensor& frames_, std::optional<Tensor> time_, std::optional<Tensor> valid_, const Tensor& table_,
               Ints capacities, Ints grids, Ints intervals, Ints entries, Ints rule, int64_t R, int64_t K,
               int64_t small) {
  const Geometry g =
      contract::bank_plan(frames_, time_, valid_, table_, {capacities, grids, intervals, entries, rule}, R, K, small);
  const Device device(frames_);
  const Tensor frames = dense(frames_), table = dense(table_);
  const Tensor time = time_ ? dense(*time_) : frames, valid = valid_ ? dense(*valid_) : frames;
  const int64_t S = frames.size(0), N = frames.size(1), H = frames.size(2), W = frames.size(3), D = frames.size(4);
  const MapOffsets maps(g);
  const int last = g.tiers - 1;
  const ScalarType wide = table.scalar_type();
  const auto whole = [&](Ints sizes) { return make(frames, sizes, ScalarType::Long); };
  Tensor descriptor = make(table, {S, g.M, R, K}), norm = make(table, {S, g.M, R}), link = make(table, {S, g.P}, wide);
  Tensor entry = whole({S, g.M, 4}), order = whole({S, g.M}), counter = whole({S, kLength + g.tiers});
  Tensor clock = make(frames, {S, g.M, 4}, ScalarType::Double), assign = whole({S, N});
  Tensor pooled = make(frames, {S, N, small, D}), seen = make(table, {S, N, R, K});
  dispatch_floating(frames.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    using A = acc_t<T>;
    constexpr int V = sizeof(uint4) / sizeof(T);
    AxisTable axes;
    if (small) {
      axes.add(maps.rows[0][last], H, g.height[last]);
      axes.add(maps.columns[0][last], W, g.width[last]);
    }
    DescribeArgs<T> describe{g,
                             maps,
                             axes,
                             data<T>(frames),
                             valid_ ? data<bool>(valid) : nullptr,
                             data<A>(table),
                             mutable_data<A>(seen),
                             mutable_data<T>(pooled),
                             slices_of(small ? D : K),
                             N};
    const auto kernel =
        aligned<T>(D, {describe.frames, describe.pooled}) ? describe_kernel<T, V> : describe_kernel<T, 1>;
    if (S * N * describe.slices > 0)
      launch(device, "bank_plan", kernel, S * N * describe.slices, PushShared<A>::bytes(g, axes), describe);
    const size_t lists = (sizeof(Work<A>) + 15) / 16 * 16 + staged_bytes<A>(g);
    const bool staged = lists <= kMaxShared;
    ReplayArgs<A> replay{g,
                         mutable_data<A>(seen),
                         mutable_data<A>(descriptor),
                         mutable_data<A>(norm),
                         mutable_data<A>(link),
                         mutable_data<int64_t>(entry),
                         mutable_data<double>(clock),
                         mutable_data<int64_t>(order),
                         mutable_data<int64_t>(counter),
                         mutable_data<int64_t>(assign),
                         time_ ? data<double>(time) : nullptr,
                         valid_ ? data<bool>(valid) : nullptr,
                         N,
                         staged};
    if (S > 0) launch(device, "bank_plan", &replay_kernel<A>, S, staged ? lists : sizeof(Work<A>), replay);
  });
  return {descriptor, norm, link, entry, clock, order, counter, assign, pooled};
}

}  // namespace
}  // namespace vmemory::bank

VMEMORY_CUDA_IMPL(m) {
  m.impl("bank_decide", TORCH_BOX(&vmemory::bank::bank_decide));
  m.impl("bank_push_", TORCH_BOX(&vmemory::bank::bank_push_));
  m.impl("bank_plan", TORCH_BOX(&vmemory::bank::bank_plan));
}
