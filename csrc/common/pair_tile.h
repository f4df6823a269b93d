// Register tiles of products of bfloat16 pairs summed in float32, for processors that multiply them directly.
#pragma once

#include "common/product_tile.h"

namespace vmemory {

#if defined(__AVX512F__) && defined(__x86_64__)
inline bool has_pair_products() {
  static const bool has = __builtin_cpu_supports("avx512bf16");
  return has;
}

#pragma GCC push_options
#pragma GCC target("avx512bf16")

// C[r][w] (+)= sum over k of A(r, k) B(k, w), with pairs of neighbours in k side by side: a[r * a_step + k] and
// b[k / 2 * b_step + w], K even
template <int W, bool kAdd>
void pair_tile(const bf16* a, int64_t a_step, const uint32_t* b, int64_t b_step, int64_t K, float* c, int64_t c_step) {
  constexpr int R = kProductRows;
  constexpr int64_t L = kLanes<float>;
  __m512 sum[R][W];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
    for (int w = 0; w < W; ++w) sum[r][w] = _mm512_setzero_ps();
  for (int64_t k = 0; k < K; k += 2, b += b_step) {
    __m512bh x[W];
#pragma GCC unroll 3
    for (int w = 0; w < W; ++w) x[w] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + w * L));
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int pair;
      __builtin_memcpy(&pair, a + r * a_step + k, sizeof pair);
      const __m512bh y = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
#pragma GCC unroll 3
      for (int w = 0; w < W; ++w) sum[r][w] = _mm512_dpbf16_ps(sum[r][w], y, x[w]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
    for (int w = 0; w < W; ++w) {
      float* to = c + r * c_step + w * L;
      _mm512_storeu_ps(to, kAdd ? _mm512_add_ps(_mm512_loadu_ps(to), sum[r][w]) : sum[r][w]);
    }
}

#pragma GCC pop_options

template <bool kAdd>
void pair_tile(int64_t vectors, const bf16* a, int64_t a_step, const uint32_t* b, int64_t b_step, int64_t K, float* c,
               int64_t c_step) {
  if (vectors == 3) return pair_tile<3, kAdd>(a, a_step, b, b_step, K, c, c_step);
  if (vectors == 2) return pair_tile<2, kAdd>(a, a_step, b, b_step, K, c, c_step);
  pair_tile<1, kAdd>(a, a_step, b, b_step, K, c, c_step);
}
#else
constexpr bool has_pair_products() { return false; }

template <bool kAdd>
void pair_tile(int64_t, const bf16*, int64_t, const uint32_t*, int64_t, int64_t, float*, int64_t) {}
#endif

}  // namespace vmemory
