// Frame descriptors: the mean over a frame's cells, its norm, and the cosine between two; host side.
// One order of summation for every caller, so that streaming, planning and pooling decide alike.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/rows.h"

namespace vmemory {

// The mean over a frame's cells, summed in groups of four and the groups in levels. Cells may be added in pieces; the
// grouping, and thus the result bit for bit, does not depend on the pieces.
template <class T>
class CellSum {
  using A = acc_t<T>;

 public:
  explicit CellSum(int64_t D) : D_(D), levels_(D) {}

  void reset() {
    levels_.reset(D_);
    next_ = 0;
  }

  // adds cells up to `end` that fill whole groups; cell c begins at frame + c * pitch
  void add(const T* frame, int64_t pitch, int64_t end) {
    for (; next_ + 4 <= end; next_ += 4) add_group(frame, pitch, 4);
  }

  // the cells that `add` left, then the mean
  void mean(const T* frame, int64_t pitch, int64_t cells, A* out) {
    add(frame, pitch, cells);
    if (next_ < cells) add_group(frame, pitch, cells - next_);
    const A n = static_cast<A>(cells);
    for_channels<A>(D_, [&](int64_t d, int64_t lanes) { store_some(out + d, levels_.total(d, lanes) / n, lanes); });
  }

 private:
  void add_group(const T* frame, int64_t pitch, int64_t n) {
    const T *row[4], *ahead[4];
    for (int64_t k = 0; k < n; ++k) row[k] = frame + (next_ + k) * pitch, ahead[k] = row[k] + 4 * pitch;
    sum_few<false>(row, ahead, static_cast<const A*>(nullptr), n, D_,
                   [&](int64_t d, vec<A> s, int64_t lanes) { levels_.add(d, s, lanes); });
    levels_.close();
  }

  int64_t D_, next_ = 0;
  LevelSum<A> levels_;
};

template <class T>
void frame_mean(const T* frame, int64_t pitch, int64_t cells, acc_t<T>* out, CellSum<T>& sum) {
  sum.reset();
  sum.mean(frame, pitch, cells, out);
}

template <class T>
inline acc_t<T> norm(const T* x, int64_t D) {
  return std::sqrt(dot(x, x, D));
}

// a NaN norm stays NaN
template <class A>
inline A cosine(A product, A norm_a, A norm_b) {
  constexpr A eps = A(1e-8);
  return product / ((norm_a < eps ? eps : norm_a) * (norm_b < eps ? eps : norm_b));
}

template <class A>
struct Products {
  A ab, bb;
};

// dot(a, b) and dot(b, b) to the bit, reading b once; meanwhile the row `next` is fetched into the second-level cache
template <class T>
inline Products<acc_t<T>> dot_and_square(const T* a, const T* b, int64_t n, const T* next) {
  using A = acc_t<T>;
  constexpr int64_t L = kLanes<A>;
  vec<A> ab[4] = {}, bb[4] = {};
  int64_t i = 0;
  const auto step = [&](int k, vec<A> x, vec<A> y) {
    __builtin_prefetch(next + i + k * L, 0, 1);
    ab[k] = multiply_add(x, y, ab[k]);
    bb[k] = multiply_add(y, y, bb[k]);
  };
  for (; i + 4 * L <= n; i += 4 * L)
    for (int k = 0; k < 4; ++k) step(k, load(a + i + k * L), load(b + i + k * L));
  for (; i + L <= n; i += L) step(0, load(a + i), load(b + i));
  if (i < n) step(1, load(a + i, n - i), load(b + i, n - i));
  return {sum<A>((ab[0] + ab[1]) + (ab[2] + ab[3])), sum<A>((bb[0] + bb[1]) + (bb[2] + bb[3]))};
}

}  // namespace vmemory
