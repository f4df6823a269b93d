// Symmetric quantisation of rows to 8 or 4 bits: scales, rounding, and the nibbles of packed rows.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/dot_tile.h"
#include "common/rows.h"

namespace vmemory {

constexpr int largest_value(int64_t bits) { return bits == 8 ? 127 : 7; }
constexpr int64_t stored_bytes(int64_t channels, int64_t bits) {
  return bits == 8 ? channels : stored_elements<nibbles>(channels);
}
constexpr uint8_t packed(int low, int high) {
  return static_cast<uint8_t>((static_cast<unsigned>(low) & 15u) | (static_cast<unsigned>(high) & 15u) << 4);
}

// The scale of a row: 0 where it would not be a normal number, NaN where the row or its scale is not finite.
template <class T>
inline float row_scale(const T* x, int64_t D, int64_t bits) {
  using A = acc_t<T>;
  // four accumulators of each kind, so that no step waits for the previous one
  vec<A> peak[4] = {}, rest[4] = {};
  int64_t turn = 0;
  for_channels<A>(D, [&](int64_t d, int64_t lanes) {
    const vec<A> value = load_some(x + d, lanes), size = value < A(0) ? -value : value;
    const int64_t k = turn++ % 4;
    peak[k] = size > peak[k] ? size : peak[k];
    // 0 for every finite value, else NaN
    rest[k] += value - value;
  });
  A most = 0;
  for (const vec<A>& p : peak)
    for (int64_t k = 0; k < kLanes<A>; ++k) most = std::max(most, p[k]);
  const A odd = sum<A>((rest[0] + rest[1]) + (rest[2] + rest[3]));
  const float scale = static_cast<float>(most / static_cast<A>(largest_value(bits)));
  if (odd != A(0) || scale > std::numeric_limits<float>::max()) return std::numeric_limits<float>::quiet_NaN();
  return scale < std::numeric_limits<float>::min() ? 0.0f : scale;
}

// round to nearest even within the range of `bits`, for values far below 2^22
template <class A>
inline vec<A> round_clamped(vec<A> x, int64_t bits) {
  constexpr A magic = sizeof(A) == 4 ? A(12582912.0) : A(6755399441055744.0);  // 1.5 * 2^23, 1.5 * 2^52
  const vec<A> whole = (x + magic) - magic, most = broadcast<A>(static_cast<A>(largest_value(bits)));
  return whole > most ? most : (whole < -most ? -most : whole);
}

// whole numbers within int8
template <class A>
inline void narrow8(int8_t* p, vec<A> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) {
    const __m512i whole = _mm512_cvtps_epi32(reinterpret_cast<__m512>(x));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(whole));
    return;
  }
#elif defined(__SSE4_1__)
  if constexpr (sizeof(A) == 4) {
#if defined(__AVX2__)
    const __m256i whole = _mm256_cvtps_epi32(reinterpret_cast<__m256>(x));
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
#else
    const __m128i whole = _mm_cvtps_epi32(reinterpret_cast<__m128>(x)), words = _mm_packs_epi32(whole, whole);
#endif
    const int64_t bytes = _mm_cvtsi128_si64(_mm_packs_epi16(words, words));
    std::memcpy(p, &bytes, kLanes<A>);
    return;
  }
#endif
  for (int64_t k = 0; k < kLanes<A>; ++k) p[k] = static_cast<int8_t>(x[k]);
}

// writes a row's values and returns its scale
template <class T>
inline float quantize_row(const T* x, int64_t D, int64_t bits, void* out) {
  using A = acc_t<T>;
  constexpr int64_t L = kLanes<A>;
  const float scale = row_scale(x, D, bits);
  if (!(scale > 0)) {
    std::memset(out, 0, stored_bytes(D, bits));
    return scale;
  }
  const vec<A> divisor = broadcast<A>(static_cast<A>(scale));
  for_channels<A>(D, [&](int64_t d, int64_t lanes) {
    int8_t plain[L];
    narrow8<A>(plain, round_clamped<A>(load_some(x + d, lanes) / divisor, bits));
    if (bits == 8) {
      std::memcpy(static_cast<int8_t*>(out) + d, plain, lanes);
      return;
    }
    uint8_t halves[L / 2];
    for (int64_t k = 0; k < L / 2; ++k) halves[k] = packed(plain[2 * k], plain[2 * k + 1]);
    std::memcpy(static_cast<uint8_t*>(out) + d / 2, halves, (lanes + 1) / 2);
  });
  return scale;
}

// out = values * scale
template <class Q, class T>
inline void dequantize_row(const Q* row, int64_t D, float scale, T* out) {
  using A = acc_t<T>;
  const vec<A> factor = broadcast<A>(static_cast<A>(scale));
  for_channels<A>(
      D, [&](int64_t d, int64_t lanes) { store_some(out + d, load_some_row<A>(row, d, lanes) * factor, lanes); });
}

}  // namespace vmemory
