// Argument checks of the operators on neighbours in time.
#pragma once

#include "torch/expect.h"

namespace vmemory::contract {

inline void adjacent_similarity(const Tensor& frames, const std::string& level) {
  Argument("frames", frames).shape({kAny, kAny, kAny, kAny}).floating().at_least(1, 2);
  expect_choice("level", level, {"frame", "token"});
}

inline void adjacent_similarity_backward(const Tensor& grad_, const Tensor& compared_, const Tensor& similarity_,
                                         const Tensor& norm_) {
  const Argument compared("compared", compared_), grad("grad", grad_);
  const Argument similarity("similarity", similarity_), norm("norm", norm_);
  compared.shape({kAny, kAny, kAny, kAny}).floating();
  const int64_t S = compared.size(0), T = compared.size(1), N = compared.size(2);
  const int64_t pairs = std::max<int64_t>(T - 1, 0);
  grad.shape({S, pairs, N}).sums_of(compared);
  similarity.shape({S, pairs, N}).sums_of(compared);
  norm.shape({S, T, N}).sums_of(compared);
}

inline void adjacent_merge(const Tensor& bank_, const Tensor& size, const std::string& level) {
  const Argument bank("bank", bank_);
  bank.shape({kAny, kAny, kAny, kAny}).floating().at_least(2, 1).at_least(1, 2);
  Argument("size", size).shape({bank.size(0), bank.size(1), bank.size(2)}).sums_of(bank);
  expect_choice("level", level, {"frame", "token"});
}

inline void adjacent_merge_backward(const Tensor& grad_, const Tensor& size, const Tensor& place_) {
  const Argument grad("grad", grad_), place("place", place_);
  grad.shape({kAny, kAny, kAny, kAny}).floating().at_least(1, 1).at_least(1, 2);
  const int64_t S = grad.size(0), T = grad.size(1) + 1, N = grad.size(2);
  Argument("size", size).shape({S, T, N}).sums_of(grad);
  place.shape({S, place.dims() == 2 && place.size(1) == 1 ? 1 : N}).of(dtype::int64).beside(grad).values(0, T - 2);
}

}  // namespace vmemory::contract
