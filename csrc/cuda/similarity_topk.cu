#include <algorithm>

#include "contracts/similarity_topk.h"
#include "cuda/device.h"
#include "similarity_topk.cuh"

namespace vmemory::search {
namespace {

constexpr int64_t kQueryBytes = 40 << 10;  // beside the keys in what every device grants without asking
constexpr int64_t kMaxChannels = 4096;
constexpr int64_t kMaxGridSide = 65535;

template <class U, class T, bool kAligned>
void search(const Device& device, Args& args, int64_t S) {
  args.padded = padded_channels<T>(std::max<int64_t>(args.D, 1));
  const size_t row = args.padded * sizeof(float);
  const auto groups = [&](auto queries) {
    constexpr int kQueries = decltype(queries)::value;
    const int64_t chunks = (args.Q + kQueries - 1) / kQueries;
    const int64_t most = std::max<int64_t>((args.groups + kWarps - 1) / kWarps, 1);
    const int64_t blocks = std::clamp<int64_t>(8 * device.processors() / (S * chunks), 1, most);
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(S), static_cast<unsigned>(chunks));
    device.launch("similarity_topk", &groups_kernel<U, T, kQueries, kAligned>, grid, kThreads, kQueries * row, args);
  };
  // no more queries at a time than there are, nor than fit; with 16 a thread's registers leave room for one block
  const int64_t fit = std::min<int64_t>(args.Q, kQueryBytes / row);
  if (fit > 4 && 8 * row <= kQueryBytes) {
    groups(std::integral_constant<int, 8>{});
  } else if (fit > 1 && 4 * row <= kQueryBytes) {
    groups(std::integral_constant<int, 4>{});
  } else {
    groups(std::integral_constant<int, 1>{});
  }
  const dim3 grid(static_cast<unsigned>(args.Q), static_cast<unsigned>(S));
  device.launch("similarity_topk", &finish_kernel<U, T, kAligned>, grid, kFinishThreads, row, args);
}

std::tuple<Tensor, Tensor> similarity_topk(const Tensor& query_, const Tensor& memory_, std::optional<Tensor> count_,
                                           std::optional<Tensor> where_, std::optional<Tensor> scale_,
                                           std::optional<Tensor> norm, int64_t k, std::string metric) {
  // `norm` is not used: the kernel is bound by reading the rows, so summing their squares costs no time
  contract::similarity_topk(query_, memory_, count_, where_, scale_, norm, k, metric);
  const Device device(query_);
  const Tensor query = dense(query_), memory = dense(memory_);
  const Tensor count = count_ ? dense(*count_) : query, where = where_ ? dense(*where_) : query;
  const Tensor scale = scale_ ? dense(*scale_) : query;
  const int64_t S = query.size(0), Q = query.size(1), M = memory.size(1), D = query.size(2);
  VMEMORY_CHECK(query.scalar_type() != ScalarType::Double, "query: float64 is not searched on CUDA devices");
  VMEMORY_CHECK(memory.scalar_type() != ScalarType::Byte, "memory: 4 bits are not searched on CUDA devices");
  VMEMORY_CHECK(D <= kMaxChannels, "query: expected at most ", kMaxChannels, " channels on a CUDA device, got ", D);
  VMEMORY_CHECK(S <= kMaxGridSide && Q <= kMaxGridSide, "query: too many streams or queries for one launch");
  Tensor value = make(query, {S, Q, k}, ScalarType::Float), index = make(query, {S, Q, k}, ScalarType::Long);
  if (S == 0 || Q == 0) return {value, index};
  Args args{};
  args.Q = Q, args.M = M, args.D = D, args.k = static_cast<int>(k);
  args.cosine = metric == "cosine";
  // the chosen groups are read a second time, by one block per query
  args.group = k <= 64 ? 4 * kRows : kRows;
  args.groups = (M + args.group - 1) / args.group;
  const Tensor best = make(query, {S, Q, args.groups}, ScalarType::Long);
  args.query = data<void>(query), args.memory = data<void>(memory);
  args.count = count_ ? data<int64_t>(count) : nullptr;
  args.where = where_ ? data<bool>(where) : nullptr;
  args.scale = scale_ ? data<float>(scale) : nullptr;
  args.best = reinterpret_cast<Key*>(mutable_data<int64_t>(best));
  args.value = mutable_data<float>(value), args.index = mutable_data<int64_t>(index);
  const auto run = [&](auto u, auto t) {
    using U = typename decltype(u)::type;
    using T = typename decltype(t)::type;
    const bool aligned = D * sizeof(T) % 16 == 0 && reinterpret_cast<uintptr_t>(args.memory) % 16 == 0;
    aligned ? search<U, T, true>(device, args, S) : search<U, T, false>(device, args, S);
  };
  dispatch_floating(query.scalar_type(), [&](auto u) {
    if constexpr (!std::is_same_v<decltype(u), tag<double>>)
      memory.scalar_type() == ScalarType::Char ? run(u, tag<int8_t>{}) : run(u, u);
  });
  return {value, index};
}

}  // namespace
}  // namespace vmemory::search

VMEMORY_CUDA_IMPL(m) { m.impl("similarity_topk", TORCH_BOX(&vmemory::search::similarity_topk)); }
