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

// the source cells of each output cell with weights that sum to one; none where all have mass 0
template <class A>
struct Windows {
  std::vector<int64_t> first;  // [cells + 1], where each output cell's sources begin
  std::vector<int64_t> cell;
  std::vector<A> weight;
  std::vector<A> held;  // summed weight before normalisation
  int64_t height = 0, width = 0;

  Windows() = default;
  // mass [rows.n * columns.n] may be null = every source counts once
  Windows(const AxisMap<A>& rows, const AxisMap<A>& columns, const float* mass) : height(rows.m), width(columns.m) {
    for (int64_t i = 0; i < height; ++i)
      for (int64_t j = 0; j < width; ++j) add(rows, columns, i, j, mass);
  }

  void clear() { first.clear(), cell.clear(), weight.clear(), held.clear(); }

  void add(const AxisMap<A>& rows, const AxisMap<A>& columns, int64_t i, int64_t j, const float* mass) {
    if (first.empty()) first.push_back(0);
    const size_t begin = cell.size();
    A total = 0;
    for (int64_t y = rows.begin(i); y < rows.end(i); ++y)
      for (int64_t x = columns.begin(j); x < columns.end(j); ++x) {
        const int64_t c = y * columns.n + x;
        const A w = rows.at(i, y) * columns.at(j, x) * (mass ? static_cast<A>(mass[c]) : A(1));
        if (w == A(0)) continue;
        cell.push_back(c);
        weight.push_back(w);
        total += w;
      }
    if (total != A(1))
      for (size_t k = begin; k < weight.size(); ++k) weight[k] /= total;
    held.push_back(total);
    first.push_back(static_cast<int64_t>(cell.size()));
  }
};

// out[d0, d1) = the weighted mean of one output cell's source rows, `stride` elements apart
template <class T, class U>
void pool_cell(const Windows<acc_t<T>>& windows, int64_t k, const T* in, int64_t stride, U* out, int64_t d0,
               int64_t d1) {
  using A = acc_t<T>;
  constexpr int64_t L = kLanes<A>;
  const int64_t begin = windows.first[k], end = windows.first[k + 1];
  for (int64_t d = d0; d < d1; d += L) {
    const int64_t left = d1 - d < L ? d1 - d : L;
    vec<A> s{};
    for (int64_t c = begin; c < end; ++c) {
      const T* from = in + windows.cell[c] * stride + d;
      s += (left == L ? load(from) : load(from, left)) * windows.weight[c];
    }
    left == L ? store(out + d, s) : store(out + d, s, left);
  }
}

// output cells [k0, k1) of tokens [H, W, D], channels [d0, d1)
template <class T>
void pool_cells(const Windows<acc_t<T>>& windows, int64_t k0, int64_t k1, const T* in, T* out, int64_t D, int64_t d0,
                int64_t d1) {
  for (int64_t k = k0; k < k1; ++k) pool_cell(windows, k, in, D, out + k * D, d0, d1);
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

// Windows the other way round: where each source cell goes, and with what weight.
template <class A>
struct Scatter {
  std::vector<int64_t> first;  // [sources + 1]
  std::vector<int64_t> target;
  std::vector<A> weight;

  // where a group of n sources goes if it is one place with one weight, else -1
  int64_t common(int64_t source, int64_t n) const {
    for (int64_t c = source; c < source + n; ++c) {
      const int64_t at = first[c];
      if (first[c + 1] != at + 1 || target[at] != target[first[source]] || weight[at] != weight[first[source]])
        return -1;
    }
    return target[first[source]];
  }

  Scatter(const Windows<A>& windows, int64_t sources) : first(sources + 1) {
    for (const int64_t c : windows.cell) ++first[c + 1];
    for (int64_t c = 0; c < sources; ++c) first[c + 1] += first[c];
    target.resize(windows.cell.size());
    weight.resize(windows.cell.size());
    std::vector<int64_t> next(first.begin(), first.end() - 1);
    for (size_t k = 0; k < windows.held.size(); ++k)
      for (int64_t i = windows.first[k]; i < windows.first[k + 1]; ++i) {
        const int64_t at = next[windows.cell[i]]++;
        target[at] = static_cast<int64_t>(k);
        weight[at] = windows.weight[i];
      }
  }
};

// N <= 4 rows, `pitch` elements apart, read once: copied to `to` (same pitch), their sum added to `sum` and, weighted,
// to `pooled`.
template <int N, bool Copy, bool Pool, class T>
void add_rows(const T* row, int64_t pitch, T* to, acc_t<T>* sum, acc_t<T>* pooled, acc_t<T> weight, int64_t D) {
  using A = acc_t<T>;
  constexpr int64_t L = kLanes<A>;
  for (int64_t d = 0; d < D; d += L) {
    const int64_t left = D - d;
    const auto get = [left](const auto* p) { return left >= L ? load(p) : load(p, left); };
    const auto put = [left](auto* p, vec<A> v) { left >= L ? store(p, v) : store(p, v, left); };
    vec<A> x[N];
    for (int k = 0; k < N; ++k) x[k] = get(row + k * pitch + d);
    if constexpr (Copy)
      for (int k = 0; k < N; ++k) put(to + k * pitch + d, x[k]);
    vec<A> s = x[0];
    if constexpr (N == 2) s = x[0] + x[1];
    if constexpr (N == 3) s = (x[0] + x[1]) + x[2];
    if constexpr (N == 4) s = (x[0] + x[1]) + (x[2] + x[3]);
    put(sum + d, get(sum + d) + s);
    if constexpr (Pool) put(pooled + d, get(pooled + d) + s * weight);
  }
}

// the same for n = 1 to 4 rows; `to` and `pooled` may be null
template <class T>
void add_group(const T* row, int64_t pitch, int64_t n, T* to, acc_t<T>* sum, acc_t<T>* pooled, acc_t<T> weight,
               int64_t D) {
  const auto run = [&]<int N>(std::integral_constant<int, N>) {
    if (to && pooled) return add_rows<N, true, true>(row, pitch, to, sum, pooled, weight, D);
    if (to) return add_rows<N, true, false>(row, pitch, to, sum, pooled, weight, D);
    if (pooled) return add_rows<N, false, true>(row, pitch, to, sum, pooled, weight, D);
    add_rows<N, false, false>(row, pitch, to, sum, pooled, weight, D);
  };
  if (n == 4) return run(std::integral_constant<int, 4>{});
  if (n == 3) return run(std::integral_constant<int, 3>{});
  if (n == 2) return run(std::integral_constant<int, 2>{});
  run(std::integral_constant<int, 1>{});
}

template <class A, class T>
void scale_row(const A* row, A weight, T* to, int64_t D) {
  constexpr int64_t L = kLanes<A>;
  int64_t d = 0;
  for (; d + L <= D; d += L) store(to + d, load(row + d) * weight);
  if (d < D) store(to + d, load(row + d, D - d) * weight, D - d);
}

}  // namespace vmemory
