// Argument checks of the gated fusion.
#pragma once

#include "torch/expect.h"

namespace vmemory::contract {

inline void gate(const Argument& working, const Tensor& episodic, const Argument& w1, const Tensor& w2,
                 const Tensor& b2, const std::string& activation) {
  working.shape({kAny, kAny}).floating();
  const int64_t n = working.size(0), D = working.size(1);
  Argument("episodic", episodic).shape({n, D}).like(working);
  w1.shape({kAny, 2 * D}).like(working);
  Argument("w2", w2).shape({D, w1.size(0)}).like(working);
  Argument("b2", b2).shape({D}).like(working);
  expect_choice("activation", activation, {"relu", "gelu", "silu"});
}

inline void gated_fusion(const Tensor& working_, const Tensor& episodic, const Tensor& w1_, const Tensor& b1,
                         const Tensor& w2, const Tensor& b2, const std::string& activation) {
  const Argument working("working", working_), w1("w1", w1_);
  gate(working, episodic, w1, w2, b2, activation);
  Argument("b1", b1).shape({w1.size(0)}).like(working);
}

inline void gated_fusion_backward(const Tensor& grad, const Tensor& working_, const Tensor& episodic, const Tensor& w1_,
                                  const Tensor& w2, const Tensor& b2, const Tensor& hidden,
                                  const std::string& activation) {
  const Argument working("working", working_), w1("w1", w1_);
  gate(working, episodic, w1, w2, b2, activation);
  Argument("grad", grad).shape({working.size(0), working.size(1)}).like(working);
  Argument("hidden", hidden).shape({working.size(0), w1.size(0)}).like(working);
}

}  // namespace vmemory::contract
