// Argument checks of the pooling operators.
#pragma once

#include "torch/expect.h"

namespace vmemory::contract {

inline void grid(const Argument& tokens) {
  tokens.shape({kAny, kAny, kAny, kAny}).floating();
  for (const int64_t side : {1, 2}) tokens.at_least(1, side).at_most(kMostSide, side);
}

// a grid [H, W] of which 2 x 2 blocks become the cells of [h, w]
inline void shuffled(const std::string& mode, int64_t H, int64_t W, int64_t h, int64_t w) {
  VMEMORY_CHECK(H % 2 == 0 && W % 2 == 0, "mode: expected even sides for ", mode, ", got ", H, " and ", W);
  const bool fits = mode == "pixel_shuffle_v1" ? h == W / 2 && w == H / 2 : h == H / 2 && w == W / 2;
  VMEMORY_CHECK(fits, "size: expected half of ", H, " and ", W, " for ", mode, ", got ", h, " and ", w);
}

inline bool shuffles(const std::string& mode) { return mode.rfind("pixel_shuffle", 0) == 0; }

// grid_pool and grid_pool_stats
inline void grid_pool(const Tensor& tokens_, const Ints& size, const std::string& mode) {
  const Argument tokens("tokens", tokens_);
  grid(tokens);
  expect_grid("size", size);
  expect_choice("mode", mode, {"area", "bilinear", "pixel_shuffle_v1", "pixel_shuffle_v2"});
  if (shuffles(mode)) shuffled(mode, tokens.size(1), tokens.size(2), size[0], size[1]);
}

inline void grid_pool_backward(const Tensor& grad_, const std::optional<Tensor>& cell, const Ints& grid_,
                               const std::string& mode) {
  const Argument grad("grad", grad_);
  grid(grad);
  expect_grid("grid", grid_);
  expect_choice("mode", mode, {"area", "bilinear", "pixel_shuffle_v1", "pixel_shuffle_v2"});
  if (shuffles(mode)) {
    shuffled(mode, grid_[0], grid_[1], grad.size(1), grad.size(2));
    VMEMORY_CHECK(grad.size(3) % 4 == 0, "grad: expected four channels for each of the tokens', got ", grad.size(3));
  }
  const int64_t channels = shuffles(mode) ? grad.size(3) / 4 : grad.size(3);
  Argument("cell", cell).shape({grad.size(0), channels}).sums_of(grad);
}

// the rows that grids of these heights and widths have together
inline int64_t ragged_rows(const Ints& sizes, int64_t frames) {
  VMEMORY_CHECK(static_cast<int64_t>(sizes.size()) == 2 * frames, "sizes: expected a height and a width for each of ",
                frames, " frames, got ", sizes.size(), " numbers");
  int64_t rows = 0;
  for (int64_t f = 0; f < frames; ++f) {
    for (const int64_t side : {sizes[2 * f], sizes[2 * f + 1]}) expect_int("sizes", side, 1, kMostSide);
    rows += sizes[2 * f] * sizes[2 * f + 1];
    VMEMORY_CHECK(rows <= kMostElements, "sizes: expected at most 2^48 rows together");
  }
  return rows;
}

inline void grid_pool_ragged(const Tensor& tokens_, const Ints& sizes, const std::string& mode) {
  const Argument tokens("tokens", tokens_);
  grid(tokens);
  expect_choice("mode", mode, {"area", "bilinear"});
  ragged_rows(sizes, tokens.size(0));
}

inline void grid_pool_ragged_backward(const Tensor& grad_, const Ints& sizes, const Ints& grid_,
                                      const std::string& mode) {
  const Argument grad("grad", grad_);
  expect_grid("grid", grid_);
  expect_choice("mode", mode, {"area", "bilinear"});
  grad.shape({ragged_rows(sizes, static_cast<int64_t>(sizes.size() / 2)), kAny}).floating();
}

}  // namespace vmemory::contract
