// Argument checks of selecting and gathering tokens.
#pragma once

#include "torch/expect.h"

namespace vmemory::contract {

constexpr int64_t kMostSegments = 4096;

inline void select_tokens(const Tensor& scores_, const Ints& budgets, const std::optional<Tensor>& segments_) {
  const Argument scores("scores", scores_), segments("segments", segments_);
  scores.shape({kAny, kAny}).floating();
  const int64_t S = scores.size(0), N = scores.size(1), count = static_cast<int64_t>(budgets.size());
  VMEMORY_CHECK(segments.given() ? count <= kMostSegments : count == 1, "budgets: expected ",
                segments.given() ? "at most 4096" : "one without segments", ", got ", count);
  for (const int64_t budget : budgets) expect_int("budgets", budget, 0, kMostElements);
  if (!segments.given()) return;
  segments.of(dtype::int64).beside(scores);
  segments.dims() == 1 ? segments.shape({N}) : segments.shape({S, N});
}

inline void compact(const std::vector<Tensor>& rows, const Tensor& keep_) {
  const Argument keep("keep", keep_);
  keep.shape({kAny, kAny}).of(dtype::int64);
  for (const Tensor& x_ : rows) {
    const Argument x("rows", x_);
    x.at_least_dims(2).beside(keep);
    VMEMORY_CHECK(x.size(0) == keep.size(0), "rows: expected ", keep.size(0), " streams, got ", x.size(0));
  }
}

inline void compact_backward(const Tensor& grad_, const Tensor& keep_, int64_t length) {
  const Argument grad("grad", grad_), keep("keep", keep_);
  keep.shape({kAny, kAny}).of(dtype::int64);
  grad.at_least_dims(2).floating().beside(keep);
  VMEMORY_CHECK(grad.size(0) == keep.size(0) && grad.size(1) == keep.size(1), "grad: expected [", keep.size(0), ", ",
                keep.size(1), ", ...], got [", grad.size(0), ", ", grad.size(1), ", ...]");
  expect_int("length", length, 0, kMostElements);
}

}  // namespace vmemory::contract
