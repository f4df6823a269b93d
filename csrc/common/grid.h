// Reduction of token grids by separable weights, and its adjoint; host side.
#pragma once

#include <string>
#include <vector>

#include "common/pool.h"
#include "common/rows.h"
#include "common/stream.h"

namespace vmemory {

// for each target cell along one axis the source cells it is made of, with weights
template <class A>
struct Axis {
  std::vector<int64_t> start{0}, source;
  std::vector<A> weight;

  int64_t size() const { return static_cast<int64_t>(start.size()) - 1; }
  void add(int64_t from, A w) {
    source.push_back(from);
    weight.push_back(w);
  }
  void close() { start.push_back(static_cast<int64_t>(source.size())); }
};

// n source cells to m target cells
template <class A>
Axis<A> reduction(bool area, int64_t n, int64_t m) {
  Axis<A> axis;
  for (int64_t i = 0; i < m; ++i) {
    if (area) {
      const int64_t begin = window_begin(i, n, m), end = window_end(i, n, m);
      for (int64_t y = begin; y < end; ++y) axis.add(y, A(1) / static_cast<A>(end - begin));
    } else {
      const auto taps = bilinear_taps<A>(i, n, m);
      axis.add(taps.low, A(1) - taps.high_weight);
      // 0 times infinity is NaN
      if (taps.high_weight > A(0)) axis.add(taps.high, taps.high_weight);
    }
    axis.close();
  }
  return axis;
}

// the same weights seen from the n source cells
template <class A>
Axis<A> adjoint(const Axis<A>& axis, int64_t n) {
  std::vector<std::vector<std::pair<int64_t, A>>> lists(n);
  for (int64_t i = 0; i < axis.size(); ++i)
    for (int64_t k = axis.start[i]; k < axis.start[i + 1]; ++k) lists[axis.source[k]].push_back({i, axis.weight[k]});
  Axis<A> out;
  for (const auto& list : lists) {
    for (const auto& [i, w] : list) out.add(i, w);
    out.close();
  }
  return out;
}

enum class Weighting { kMean, kWeights };

template <class A>
struct GridMap {
  Axis<A> rows, columns;
  Weighting weighting;

  static GridMap forward(const std::string& mode, int64_t H, int64_t W, int64_t h, int64_t w) {
    const bool area = mode == "area";
    return {reduction<A>(area, H, h), reduction<A>(area, W, w), area ? Weighting::kMean : Weighting::kWeights};
  }
  static GridMap backward(const std::string& mode, int64_t H, int64_t W, int64_t h, int64_t w) {
    const GridMap to = forward(mode, H, W, h, w);
    return {adjoint(to.rows, H), adjoint(to.columns, W), Weighting::kWeights};
  }
};

template <class T>
struct RowScratch {
  std::vector<const T*> cell;  // of every window of the row, one after the other
  std::vector<acc_t<T>> weight;
  LevelSum<acc_t<T>> levels;

  // `in` is a grid `width` cells wide, cells `pitch` elements apart
  void add_window(const GridMap<acc_t<T>>& map, int64_t i, int64_t j, const T* in, int64_t width, int64_t pitch) {
    const auto &rows = map.rows, &columns = map.columns;
    for (int64_t a = rows.start[i]; a < rows.start[i + 1]; ++a)
      for (int64_t b = columns.start[j]; b < columns.start[j + 1]; ++b) {
        cell.push_back(in + (rows.source[a] * width + columns.source[b]) * pitch);
        weight.push_back(rows.weight[a] * columns.weight[b]);
      }
  }
};

// store_some, past the caches for large results
template <class T>
inline void put(T* p, vec<acc_t<T>> x, int64_t lanes, bool streamed) {
  if constexpr (sizeof(T) >= 4) {
    if (streamed && lanes == kLanes<T>) return stream(p, x);
  }
  store_some(p, x, lanes);
}

// row i of the target grid, channels [0, D); `bias` [D] may be null
template <class T>
void map_row(const GridMap<acc_t<T>>& map, int64_t i, const T* in, int64_t width, int64_t pitch, const acc_t<T>* bias,
             T* out, int64_t D, RowScratch<T>& scratch, bool streamed = false) {
  using A = acc_t<T>;
  const int64_t w = map.columns.size(), height = map.rows.start[i + 1] - map.rows.start[i];
  scratch.cell.clear();
  scratch.weight.clear();
  for (int64_t j = 0; j < w; ++j) scratch.add_window(map, i, j, in, width, pitch);
  // the rows that are read next, to prefetch them
  if (i + 1 < map.rows.size() && w > 0) scratch.add_window(map, i + 1, 0, in, width, pitch);
  scratch.cell.insert(scratch.cell.end(), 4, in);
  const T* const* cell = scratch.cell.data();
  const A* weight = scratch.weight.data();
  for (int64_t j = 0; j < w; ++j, out += pitch) {
    const int64_t n = height * (map.columns.start[j + 1] - map.columns.start[j]);
    if (map.weighting == Weighting::kMean && (n & (n - 1)) == 0) {
      // the reciprocal of a power of two is exact, and a product costs a tenth of a quotient
      const A scale = A(1) / static_cast<A>(n);
      sum_rows<false>(cell, weight, n, D, scratch.levels,
                      [&](int64_t d, vec<A> s, int64_t lanes) { put(out + d, s * scale, lanes, streamed); });
    } else if (map.weighting == Weighting::kMean) {
      // dividing the sum, as adaptive_avg_pool2d does: multiplying by a rounded reciprocal would add an error
      sum_rows<false>(cell, weight, n, D, scratch.levels, [&](int64_t d, vec<A> s, int64_t lanes) {
        put(out + d, s / static_cast<A>(n), lanes, streamed);
      });
    } else {
      sum_rows<true>(cell, weight, n, D, scratch.levels, [&](int64_t d, vec<A> s, int64_t lanes) {
        put(out + d, bias ? s + load_some(bias + d, lanes) : s, lanes, streamed);
      });
    }
    cell += n;
    weight += n;
  }
  if (streamed) finish_streams();
}

}  // namespace vmemory
