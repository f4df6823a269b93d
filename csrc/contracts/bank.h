// Argument checks of the tiered memory's operators.
#pragma once

#include "torch/bank_args.h"
#include "torch/expect.h"

namespace vmemory::contract {

using bank::Geometry;
using bank::Layout;

// frames [S, N, H, W, D], with the cells of each that exist
inline void frames(const Argument& x, const std::optional<Tensor>& valid) {
  x.shape({kAny, kAny, kAny, kAny, kAny}).floating();
  for (const int64_t side : {2, 3}) x.at_least(1, side).at_most(kMostSide, side);
  Argument("mask", valid).shape({x.size(0), x.size(1), x.size(2), x.size(3)}).of(dtype::boolean).beside(x);
}

// reduction maps, all in one
inline void maps(const Argument& x, const Tensor& table, const Geometry& g) {
  Argument("maps", table).shape({bank::MapOffsets(g).total}).sums_of(x);
}

// The counters of the streams that rows go to: lists end inside their tiers, and frames can be counted on. On a device
// this would wait for it: there kernels clamp what they read.
inline void counters(const Argument& counter, const Tensor& all, const std::optional<Tensor>& streams_, int64_t rows,
                     int64_t added, const Geometry& g) {
  if (!counter.on_cpu()) return;
  const Tensor streams = streams_ ? dense(*streams_) : all;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t stream = streams_ ? data<int64_t>(streams)[i] : i;
    if (stream < 0 || stream >= counter.size(0)) continue;
    const int64_t* row = data<int64_t>(all) + stream * counter.size(1);
    for (int k = 0; k < bank::kLength; ++k)
      expect_int("counter", row[k], 0, std::numeric_limits<int64_t>::max() - added);
    for (int tier = 0; tier < g.tiers; ++tier) expect_int("counter", row[bank::kLength + tier], 0, g.capacity[tier]);
  }
}

inline Geometry bank_decide(const Tensor& norm_, const Tensor& link, const Tensor& entry, const Tensor& order,
                            const Tensor& counter_, const std::optional<Tensor>& streams_,
                            const std::optional<Tensor>& victim, const Layout& layout) {
  const Argument norm("norm", norm_), counter("counter", counter_), streams("streams", streams_);
  norm.shape({kAny, kAny, kAny}).floating();
  const Geometry g = layout.geometry(1, 1, 1, norm.size(2), 1);
  const int64_t S = norm.size(0);
  norm.shape({S, g.M, g.R}).in_place();
  Argument("link", link).shape({S, g.P}).like(norm).in_place();
  Argument("entry", entry).shape({S, g.M, 4}).of(dtype::int64).beside(norm).in_place();
  Argument("order", order).shape({S, g.M}).of(dtype::int64).beside(norm).in_place();
  counter.shape({S, bank::kLength + g.tiers}).of(dtype::int64).beside(norm).in_place();
  streams.shape({kAny}).of(dtype::int64).beside(norm);
  const int64_t rows = streams.given() ? streams.size(0) : S;
  Argument("victim", victim).shape({rows, g.tiers}).of(dtype::int64).beside(norm);
  counters(counter, counter_, streams_, rows, 1, g);
  return g;
}

inline Geometry bank_push_(const Tensor& slots_, const Tensor& mass, const Tensor& descriptor_, const Tensor& norm,
                           const Tensor& link, const Tensor& entry, const Tensor& clock, const Tensor& order,
                           const Tensor& counter_, const Tensor& scale, const Tensor& frames_,
                           const std::optional<Tensor>& time, const std::optional<Tensor>& valid,
                           const std::optional<Tensor>& streams_, const std::optional<Tensor>& victim,
                           const Tensor& table, const Layout& layout) {
  const Argument slots("slots", slots_), x("frames", frames_), streams("streams", streams_);
  const Argument descriptor("descriptor", descriptor_), counter("counter", counter_);
  frames(x, valid);
  descriptor.shape({kAny, kAny, kAny, kAny});
  const Geometry g = layout.geometry(x.size(2), x.size(3), x.size(4), descriptor.size(2), descriptor.size(3));
  const bool packed = slots.type() == dtype::uint8, quantized = packed || slots.type() == dtype::int8;
  slots.shape({kAny, g.L, packed ? (g.D + 1) / 2 : g.D}).beside(x).in_place();
  if (!quantized) slots.like(x);
  const int64_t S = slots.size(0);
  Argument("scale", scale).shape({S, quantized ? g.L : 0}).of(dtype::float32).beside(x).in_place();
  Argument("mass", mass).shape({S, g.L}).of(dtype::float32).beside(x).in_place();
  descriptor.shape({S, g.M, g.R, g.K}).sums_of(x).in_place();
  Argument("norm", norm).shape({S, g.M, g.R}).sums_of(x).in_place();
  Argument("link", link).shape({S, g.P}).sums_of(x).in_place();
  Argument("entry", entry).shape({S, g.M, 4}).of(dtype::int64).beside(x).in_place();
  Argument("clock", clock).shape({S, g.M, 4}).of(dtype::float64).beside(x).in_place();
  Argument("order", order).shape({S, g.M}).of(dtype::int64).beside(x).in_place();
  counter.shape({S, bank::kLength + g.tiers}).of(dtype::int64).beside(x).in_place();
  streams.shape({kAny}).of(dtype::int64).beside(x);
  x.shape({streams.given() ? streams.size(0) : S, kAny, g.H, g.W, g.D});
  Argument("time", time).shape({x.size(0), x.size(1)}).of(dtype::float64).beside(x);
  Argument("victim", victim).shape({x.size(0), x.size(1), g.tiers}).of(dtype::int64).beside(x);
  maps(x, table, g);
  counters(counter, counter_, streams_, x.size(0), x.size(1), g);
  return g;
}

inline Geometry bank_plan(const Tensor& frames_, const std::optional<Tensor>& time, const std::optional<Tensor>& valid,
                          const Tensor& table, const Layout& layout, int64_t R, int64_t K, int64_t pooled_cells) {
  const Argument x("frames", frames_);
  frames(x, valid);
  const Geometry g = layout.geometry(x.size(2), x.size(3), x.size(4), R, K);
  VMEMORY_CHECK(pooled_cells == 0 || (g.tiers > 1 && g.levels == 0 && pooled_cells == g.cells(g.tiers - 1)),
                "pooled_cells: expected none or those of the last tier, got ", pooled_cells);
  Argument("time", time).shape({x.size(0), x.size(1)}).of(dtype::float64).beside(x);
  maps(x, table, g);
  return g;
}

inline Geometry bank_gather(const Tensor& frames_, const std::optional<Tensor>& valid, const Tensor& pooled_,
                            const Tensor& assign, const Tensor& entry, const Tensor& table, const Layout& layout) {
  const Argument x("frames", frames_), pooled("pooled", pooled_);
  frames(x, valid);
  const Geometry g = layout.geometry(x.size(2), x.size(3), x.size(4), 1, x.size(4));
  const int64_t S = x.size(0), N = x.size(1), small = g.tiers > 0 ? g.cells(g.tiers - 1) : 0;
  pooled.shape({S, N, kAny, g.D}).like(x);
  VMEMORY_CHECK(pooled.size(2) == 0 || pooled.size(2) == small, "pooled: expected none or ", small,
                " cells a frame, got ", pooled.size(2));
  Argument("assign", assign).shape({S, N}).of(dtype::int64).beside(x);
  Argument("entry", entry).shape({S, g.M, 4}).of(dtype::int64).beside(x);
  maps(x, table, g);
  return g;
}

inline Geometry bank_gather_backward(const Tensor& grad_, const Tensor& mass, const std::optional<Tensor>& valid,
                                     const Tensor& assign_, const Tensor& table, const Ints& grid,
                                     const Layout& layout) {
  const Argument grad("grad", grad_), assign("assign", assign_);
  grad.shape({kAny, kAny, kAny}).floating();
  expect_grid("grid", grid);
  const Geometry g = layout.geometry(grid[0], grid[1], grad.size(2), 1, grad.size(2));
  grad.shape({kAny, g.L, g.D});
  assign.shape({grad.size(0), kAny}).of(dtype::int64).beside(grad);
  Argument("mass", mass).shape({grad.size(0), g.L}).of(dtype::float32).beside(grad);
  Argument("mask", valid).shape({grad.size(0), assign.size(1), g.H, g.W}).of(dtype::boolean).beside(grad);
  maps(grad, table, g);
  return g;
}

}  // namespace vmemory::contract
