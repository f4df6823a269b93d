#include <algorithm>

#include "contracts/select_tokens.h"
#include "cuda/device.h"
#include "select_tokens.cuh"

namespace vmemory::selection {
namespace {

// what every device grants without asking, less what the kernel itself declares
constexpr int64_t kMaxShared = (48 << 10) - kWarps * sizeof(unsigned);

// up to this size one block finishes before several blocks could synchronise
constexpr int64_t kFewPieces = 4;

template <class T, int kBudgets>
void launch(const Device& device, SelectArgs<T, kBudgets>& args, const Tensor& like, const Ints& budgets, int64_t S) {
  using U = key_t<T>;
  for (int g = 0; g < kBudgets && g < args.segments; ++g)
    args.budget[g] = static_cast<int>(std::min(budgets[g], args.N));
  // as many bits per digit as the counters of all segments have room for
  args.bits = 4;
  for (const int bits : {8, kRadixBits})
    if (Search<U>::bytes(args.segments, bits) <= kMaxShared) args.bits = bits;
  const int64_t bytes = Search<U>::bytes(args.segments, args.bits);
  const bool fits = bytes <= kMaxShared;
  const Tensor workspace = make(like, {fits ? 0 : S * bytes}, ScalarType::Byte);
  args.workspace = fits ? nullptr : mutable_data<unsigned char>(workspace);
  args.workspace_bytes = bytes;
  const auto kernel = &select_kernel<T, kBudgets>;
  args.parts = 1, args.part = args.N;
  const int64_t pieces = (args.N + kPart - 1) / kPart;
  if (fits && pieces > kFewPieces) {
    const int64_t room = device.resident_blocks(kernel, kThreads, bytes) / S,
                  parts = std::clamp<int64_t>(room, 1, pieces);
    args.part = (pieces + parts - 1) / parts * kPart;
    args.parts = static_cast<int>((args.N + args.part - 1) / args.part);
  }
  if (args.parts > 1) {
    args.passes = passes_of<U>(args.N, args.bits);
    const Tensor merged = make(like, {S, args.passes, args.segments << args.bits}, ScalarType::Int);
    const Tensor held = make(like, {S, args.parts}, ScalarType::Int);
    device.clear(merged);
    args.merged = mutable_data<unsigned>(merged), args.held = mutable_data<unsigned>(held);
    device.launch_together("select_tokens", kernel, dim3(static_cast<unsigned>(S * args.parts)), kThreads, bytes, args);
    return;
  }
  device.launch("select_tokens", kernel, dim3(static_cast<unsigned>(S)), kThreads, fits ? bytes : 0, args);
}

std::tuple<Tensor, Tensor> select_tokens(const Tensor& scores_, Ints budgets, std::optional<Tensor> segments_) {
  contract::select_tokens(scores_, budgets, segments_);
  const Device device(scores_);
  const Tensor scores = dense(scores_), segments = segments_ ? dense(*segments_) : scores;
  const int64_t S = scores.size(0), N = scores.size(1);
  VMEMORY_CHECK(N <= INT32_MAX && S <= INT32_MAX, "scores: too large for one launch");
  VMEMORY_CHECK(budgets.size() <= kMaxSegments, "budget: at most ", kMaxSegments, " segments");
  int64_t total = 0;
  bool uniform = true;
  for (const int64_t budget : budgets) total += budget, uniform &= budget == budgets[0];
  Tensor index = make(scores, {S, total}, ScalarType::Long), count = make(scores, {S}, ScalarType::Long);
  if (S == 0) return {index, count};
  dispatch_floating(scores.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    const auto run = [&](auto budget_count) {
      SelectArgs<T, decltype(budget_count)::value> args{};
      args.score = data<T>(scores);
      args.segment = segments_ ? data<int64_t>(segments) : nullptr;
      args.segment_step = segments_ && segments.dim() == 2 ? N : 0;
      args.index = mutable_data<int64_t>(index);
      args.count = mutable_data<int64_t>(count);
      args.N = N;
      args.total = total;
      args.segments = static_cast<int>(budgets.size());
      launch(device, args, scores, budgets, S);
    };
    if (uniform) {
      run(std::integral_constant<int, 1>{});
    } else {
      run(std::integral_constant<int, kMaxSegments>{});
    }
  });
  return {index, count};
}

}  // namespace
}  // namespace vmemory::selection

VMEMORY_CUDA_IMPL(m) { m.impl("select_tokens", TORCH_BOX(&vmemory::selection::select_tokens)); }
