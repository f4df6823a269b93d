// Reduction of one frame's tokens by a pair of axis maps, for a slice of channels; host side.
#pragma once

#include <algorithm>
#include <vector>

#include "common/vec.h"

namespace vmemory {

// dense weights [m, n] with the span of each row's nonzeros
template <class A>
struct AxisMap {
  const A* weight;
  int64_t n, m;

  AxisMap(const A* w, int64_t n_, int64_t m_) : weight(w), n(n_), m(m_), span_(2 * m_) {
    for (int64_t i = 0; i < m; ++i) {
      int64_t begin = 0, end = n;
      while (begin < n && w[i * n + begin] == A(0)) ++begin;
      while (end > begin && w[i * n + end - 1] == A(0)) --end;
      span_[2 * i] = begin;
      span_[2 * i + 1] = end;
    }
  }
  int64_t begin(int64_t i) const { return span_[2 * i]; }
  int64_t end(int64_t i) const { return span_[2 * i + 1]; }
  A at(int64_t i, int64_t k) const { return weight[i * n + k]; }

 private:
  std::vector<int64_t> span_;
};

// the source cells of one output cell, with weights that sum to one; empty when all have mass 0
template <class A>
struct Window {
  std::vector<int64_t> cell;
  std::vector<A> weight;
  A held = 0;  // summed weight before normalisation

  void collect(const AxisMap<A>& rows, const AxisMap<A>& columns, int64_t i, int64_t j, const float* mass) {
    cell.clear();
    weight.clear();
    held = 0;
    for (int64_t y = rows.begin(i); y < rows.end(i); ++y)
      for (int64_t x = columns.begin(j); x < columns.end(j); ++x) {
        const int64_t c = y * columns.n + x;
        const A w = rows.at(i, y) * columns.at(j, x) * (mass ? static_cast<A>(mass[c]) : A(1));
        if (w == A(0)) continue;
        cell.push_back(c);
        weight.push_back(w);
        held += w;
      }
    if (held != A(1))
      for (A& w : weight) w /= held;
  }
};

// out[d0, d1) = sum of weight * row, rows `stride` elements apart
template <class T, class U>
void weighted_sum(const Window<acc_t<T>>& window, const T* in, int64_t stride, U* out, int64_t d0, int64_t d1) {
  using A = acc_t<T>;
  constexpr int64_t L = kLanes<A>;
  const size_t n = window.cell.size();
  for (int64_t d = d0; d < d1; d += L) {
    const int64_t left = d1 - d < L ? d1 - d : L;
    vec<A> s{};
    for (size_t c = 0; c < n; ++c) {
      const T* from = in + window.cell[c] * stride + d;
      s += (left == L ? load(from) : load(from, left)) * window.weight[c];
    }
    left == L ? store(out + d, s) : store(out + d, s, left);
  }
}

// to += weight * row
template <class T>
void add_row(const T* row, acc_t<T> weight, acc_t<T>* to, int64_t D) {
  using A = acc_t<T>;
  constexpr int64_t L = kLanes<A>;
  int64_t d = 0;
  for (; d + L <= D; d += L) store(to + d, load(to + d) + load(row + d) * weight);
  if (d < D) store(to + d, load(to + d, D - d) + load(row + d, D - d) * weight, D - d);
}

// the window's rows with their weights as collected, before normalisation, added to `to`
template <class T>
void add_rows(const Window<acc_t<T>>& window, const T* in, int64_t D, acc_t<T>* to, bool fresh) {
  if (fresh) std::fill(to, to + D, acc_t<T>(0));
  for (size_t c = 0; c < window.cell.size(); ++c)
    add_row(in + window.cell[c] * D, window.weight[c] * window.held, to, D);
}

template <class A, class T>
void scale_row(const A* row, A weight, T* to, int64_t D) {
  constexpr int64_t L = kLanes<A>;
  int64_t d = 0;
  for (; d + L <= D; d += L) store(to + d, load(row + d) * weight);
  if (d < D) store(to + d, load(row + d, D - d) * weight, D - d);
}

// tokens [H, W, D] to [h, w, D], channels [d0, d1); mass may be null = every cell counts once
template <class T, class U>
void pool_tokens(const T* in, const float* mass, const AxisMap<acc_t<T>>& rows, const AxisMap<acc_t<T>>& columns,
                 U* out, int64_t D, int64_t d0, int64_t d1) {
  Window<acc_t<T>> window;
  for (int64_t i = 0; i < rows.m; ++i)
    for (int64_t j = 0; j < columns.m; ++j) {
      window.collect(rows, columns, i, j, mass);
      weighted_sum(window, in, D, out + (i * columns.m + j) * D, d0, d1);
    }
}

// source cells each output cell stands for
template <class A>
void pool_mass(const float* mass, const AxisMap<A>& rows, const AxisMap<A>& columns, float* out) {
  const A ratio = static_cast<A>(rows.n * columns.n) / static_cast<A>(rows.m * columns.m);
  Window<A> window;
  for (int64_t i = 0; i < rows.m; ++i)
    for (int64_t j = 0; j < columns.m; ++j) {
      window.collect(rows, columns, i, j, mass);
      out[i * columns.m + j] = static_cast<float>(window.held * ratio);
    }
}

}  // namespace vmemory
