// Argument checks of matching, merging and unmerging tokens.
#pragma once

#include "torch/expect.h"

namespace vmemory::contract {

// front: rows that take no part, in matching order; even rows of the others find partners among the odd rows
inline void bipartite_match(const Tensor& metric_, int64_t r, int64_t front, int64_t cls, int64_t groups) {
  const Argument metric("metric", metric_);
  metric.shape({kAny, kAny, kAny}).floating();
  const int64_t B = metric.size(0), N = metric.size(1);
  expect_int("groups", groups, 1, kMostRows);
  VMEMORY_CHECK(B % groups == 0, "groups: expected a divisor of ", B, ", got ", groups);
  VMEMORY_CHECK(N <= kMostRows / groups, "metric: expected fewer than 2^31 rows a group, got ", groups, " times ", N);
  const int64_t rows = groups * N;
  expect_int("cls", cls, 0, N);
  expect_int("front", front, 0, rows);
  const int64_t evens = (rows + 1) / 2 - (front + 1) / 2, odds = rows / 2 - front / 2;
  expect_int("r", r, 0, odds > 0 ? evens : 0);
}

// a plan's rows by token: `order` [B, M] holds the rows, `start` [B, N + 1] where each token's begin
inline void plan(const Argument& x, int64_t B, int64_t M, const Argument& order, const Argument& start) {
  order.shape({B, M}).of(dtype::int64).beside(x).values(0, M - 1);
  start.shape({B, kAny}).of(dtype::int64).beside(x).at_least(1, 1).starts(M);
}

// rows without any token that could hold them
inline void held(const Argument& place, int64_t tokens) {
  VMEMORY_CHECK(tokens > 0 || place.size(1) == 0, "place: expected no rows beside no tokens, got ", place.size(1));
}

inline void token_merge(const Tensor& x_, const std::optional<Tensor>& size, const Tensor& order, const Tensor& start) {
  const Argument x("x", x_);
  x.shape({kAny, kAny, kAny}).floating();
  Argument("size", size).shape({x.size(0), x.size(1)}).sums_of(x);
  plan(x, x.size(0), x.size(1), Argument("order", order), Argument("start", start));
}

inline void token_merge_backward(const Tensor& grad_, const std::optional<Tensor>& size, const Tensor& total,
                                 const Tensor& place_, const Tensor& start) {
  const Argument grad("grad", grad_), place("place", place_);
  grad.shape({kAny, kAny, kAny}).floating();
  const int64_t B = grad.size(0), N = grad.size(1);
  place.shape({B, kAny}).of(dtype::int64).beside(grad).values(0, N - 1);
  held(place, N);
  Argument("size", size).shape({B, place.size(1)}).sums_of(grad);
  Argument("total", total).shape({B, N}).sums_of(grad);
  Argument("start", start).shape({B, N + 1}).of(dtype::int64).beside(grad).starts(place.size(1));
}

inline void token_unmerge(const Tensor& x_, const Tensor& place_) {
  const Argument x("x", x_), place("place", place_);
  x.shape({kAny, kAny, kAny}).floating();
  place.shape({x.size(0), kAny}).of(dtype::int64).beside(x).values(0, x.size(1) - 1);
  held(place, x.size(1));
}

inline void token_unmerge_backward(const Tensor& grad_, const Tensor& order, const Tensor& start) {
  const Argument grad("grad", grad_);
  grad.shape({kAny, kAny, kAny}).floating();
  plan(grad, grad.size(0), grad.size(1), Argument("order", order), Argument("start", start));
}

}  // namespace vmemory::contract
