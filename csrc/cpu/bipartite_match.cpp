#include "common/merge_plan.h"
#include "contracts/token_merge.h"
#include "torch/stable.h"

namespace vmemory {
namespace {

constexpr int64_t kSmall = 1 << 18;  // multiplications below which a second thread costs more than it saves

// cuts `vectors` of rows of each stream into pieces so that every thread has work; a piece reads the partners anew
int64_t pieces_of(int64_t streams, int64_t vectors) {
  const int64_t threads = torch::stable::get_num_threads();
  if (threads == 1 || streams == 0) return 1;
  const int64_t wanted = (4 * threads + streams - 1) / streams;
  return std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, vectors / kProductVectors));
}

template <class T, bool kPairs>
void best_partners(const T* metric, const Sequence& sequence, int64_t streams, int64_t D, acc_t<T>* score,
                   int64_t* partner) {
  using A = acc_t<T>;
  constexpr int64_t L = kLanes<A>;
  const int64_t rows = sequence.rows(), evens = sequence.evens(), vectors = (evens + L - 1) / L;
  const Lines<A> inverse(streams * rows);
  parallel(streams * rows, kSmall / (D + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) inverse.get()[i] = inverse_norm(metric + i * D, D);
  });
  const int64_t pieces = pieces_of(streams, vectors);
  const int64_t most = std::min((vectors + pieces - 1) / pieces, Matcher<T, kPairs>::most_vectors(D));
  parallel(streams * pieces, kSmall / (evens * sequence.odds() * (D + 1) / pieces + 1),
           [&](int64_t begin, int64_t end) {
             Matcher<T, kPairs> matcher(most, D);
             for (int64_t item = begin; item < end; ++item) {
               const int64_t s = item / pieces, p = item % pieces;
               const int64_t last = std::min((p + 1) * vectors / pieces * L, evens);
               for (int64_t i = p * vectors / pieces * L; i < last; i += most * L)
                 matcher.match(metric + s * rows * D, inverse.get() + s * rows, sequence, i,
                               std::min(most * L, last - i), score + s * evens + i, partner + s * evens + i);
             }
           });
}

std::tuple<Tensor, Tensor, Tensor> bipartite_match(const Tensor& metric_, int64_t r, int64_t front, int64_t cls,
                                                   int64_t groups) {
  contract::bipartite_match(metric_, r, front, cls, groups);
  const Tensor metric = dense(metric_);
  const Sequence sequence{metric.size(1), cls, groups, front};
  const int64_t streams = metric.size(0) / groups, D = metric.size(2);
  const int64_t rows = sequence.rows(), evens = sequence.evens(), tokens = rows - r;
  Tensor place = make(metric, {streams, rows}, ScalarType::Long);
  Tensor order = make(metric, {streams, rows}, ScalarType::Long);
  Tensor start = make(metric, {streams, tokens + 1}, ScalarType::Long);
  dispatch_floating(metric.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    const Lines<acc_t<T>> score(streams * evens);
    const Lines<int64_t> partner(streams * evens);
    const auto find = [&](auto pairs) {
      best_partners<T, decltype(pairs)::value>(data<T>(metric), sequence, streams, D, score.get(), partner.get());
    };
    if (r > 0 && streams > 0) {
      if (std::is_same_v<T, bf16> && has_pair_products()) {
        find(std::is_same<T, bf16>{});
      } else {
        find(std::false_type{});
      }
    }
    int64_t *to_place = mutable_data<int64_t>(place), *to_order = mutable_data<int64_t>(order);
    int64_t* to_start = mutable_data<int64_t>(start);
    parallel(streams, kSmall / (16 * rows + 1), [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        const MergePlan plan{to_place + s * rows, to_order + s * rows, to_start + s * (tokens + 1)};
        plan.lay_out(sequence, r, score.get() + s * evens, partner.get() + s * evens);
      }
    });
  });
  return {place, order, start};
}

}  // namespace
}  // namespace vmemory

STABLE_TORCH_LIBRARY_IMPL(vmemory, CPU, m) { m.impl("bipartite_match", TORCH_BOX(&vmemory::bipartite_match)); }
