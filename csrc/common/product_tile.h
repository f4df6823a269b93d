// Register tiles of matrix products: a few rows times a few vectors of columns, summed over k.
#pragma once

#include "common/dot_tile.h"

namespace vmemory {

// sums, vectors of a row of B and factors fill the registers: thirty-two of them, or sixteen
#if defined(__AVX512F__)
constexpr int kProductRows = 8, kProductVectors = 3;
#else
constexpr int kProductRows = 4, kProductVectors = 3;
#endif

constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Rows rounded up to whole tiles. A tile reads and writes all its rows, so a buffer of n rows of A or C must have room
// for them. The rows past n may have any content, and their results are not used.
constexpr int64_t tile_rows(int64_t n) { return round_up(n, kProductRows); }

// C[r][w] (+)= sum over k of A(r, k) B[k][w] for kProductRows rows and W vectors of columns. A(r, k) is
// a[r * a_step + k], or, interleaved, a[k * kProductRows + r].
template <int W, bool kAdd, bool kInterleaved, class A>
void product_tile(const A* a, int64_t a_step, const A* b, int64_t b_step, int64_t K, A* c, int64_t c_step) {
  constexpr int R = kProductRows;
  constexpr int64_t L = kLanes<A>;
  vec<A> sum[R * W];
  unrolled<R>([&](auto r) __attribute__((always_inline)) {
    unrolled<W>([&](auto w) __attribute__((always_inline)) { sum[r * W + w] = vec<A>{}; });
  });
  const A* row[R];
  unrolled<R>([&](auto r) __attribute__((always_inline)) { row[r] = a + (kInterleaved ? int(r) : r * a_step); });
  for (int64_t k = 0; k < K; ++k) {
    vec<A> x[W];
    unrolled<W>([&](auto w) __attribute__((always_inline)) { x[w] = load(b + w * L); });
    unrolled<R>([&](auto r) __attribute__((always_inline)) {
      const vec<A> y = broadcast(kInterleaved ? row[0][k * R + r] : row[r][k]);
      unrolled<W>([&](auto w)
                      __attribute__((always_inline)) { sum[r * W + w] = multiply_add(y, x[w], sum[r * W + w]); });
    });
    b += b_step;
  }
  unrolled<R>([&](auto r) __attribute__((always_inline)) {
    unrolled<W>([&](auto w) __attribute__((always_inline)) {
      A* to = c + r * c_step + w * L;
      // added at the end, so that the content of c is not rounded K more times
      store(to, kAdd ? load(to) + sum[r * W + w] : sum[r * W + w]);
    });
  });
}

// the tile for a number of vectors known at run time only
template <bool kAdd, bool kInterleaved, class A>
void product_tile(int64_t vectors, const A* a, int64_t a_step, const A* b, int64_t b_step, int64_t K, A* c,
                  int64_t c_step) {
  if constexpr (kProductVectors > 2)
    if (vectors == 3) return product_tile<3, kAdd, kInterleaved>(a, a_step, b, b_step, K, c, c_step);
  if constexpr (kProductVectors > 1)
    if (vectors == 2) return product_tile<2, kAdd, kInterleaved>(a, a_step, b, b_step, K, c, c_step);
  product_tile<1, kAdd, kInterleaved>(a, a_step, b, b_step, K, c, c_step);
}

// `vectors` of columns in even tiles of at most kProductVectors: f(first, count)
template <class F>
void for_vector_tiles(int64_t vectors, const F& f) {
  const int64_t tiles = (vectors + kProductVectors - 1) / kProductVectors;
  for (int64_t t = 0; t < tiles; ++t) f(t * vectors / tiles, (t + 1) * vectors / tiles - t * vectors / tiles);
}

}  // namespace vmemory
