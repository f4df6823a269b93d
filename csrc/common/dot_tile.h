// Dot products of four rows with a few queries at a time. Every product is summed in one order (a chain per lane, then
// the lanes in pairs), whatever the row's address and however many queries there are.
#pragma once

#include <utility>

#include "common/vec.h"

namespace vmemory {

constexpr int kTileRows = 4;
// registers: one for every sum, for every query's vector and for one row's vector; with squares one query fewer
#if defined(__AVX512F__)
constexpr int kTileQueries = 6;
#else
constexpr int kTileQueries = 3;
#endif

constexpr int low_nibble(uint8_t pair) { return static_cast<int>((pair & 15u) ^ 8u) - 8; }
constexpr int high_nibble(uint8_t pair) { return static_cast<int>((pair >> 4) ^ 8u) - 8; }

// elements of T that hold D channels, and the one where channel d begins; d is even for nibbles
template <class T>
constexpr int64_t stored_elements(int64_t D) {
  return std::is_same_v<T, nibbles> ? (D + 1) / 2 : D;
}
template <class T>
inline const T* channel(const T* row, int64_t d) {
  return row + (std::is_same_v<T, nibbles> ? d / 2 : d);
}

// kLanes<A> channels of a row in the accumulation type; int8 and nibbles beside the types of load()
template <class A, class T>
inline vec<A> load_row(const T* p) {
  if constexpr (std::is_same_v<T, nibbles>) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<A, float>) {
      // the lookup uses the low four bits, so the bits above them may have any value
      const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
      const __m128i pairs = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
      const __m128i apart = _mm_unpacklo_epi8(pairs, _mm_srli_epi16(pairs, 4));
      return reinterpret_cast<vec<A>>(_mm512_permutexvar_ps(_mm512_cvtepu8_epi32(apart), table));
    }
#elif defined(__AVX2__)
    if constexpr (std::is_same_v<A, float>) {
      int32_t pairs;
      std::memcpy(&pairs, p, sizeof pairs);
      const __m256i high = _mm256_sllv_epi32(_mm256_set1_epi32(pairs), _mm256_setr_epi32(28, 24, 20, 16, 12, 8, 4, 0));
      return reinterpret_cast<vec<A>>(_mm256_cvtepi32_ps(_mm256_srai_epi32(high, 28)));
    }
#endif
    vec<A> out;
    for (int64_t k = 0; k < kLanes<A> / 2; ++k) {
      out[2 * k] = static_cast<A>(low_nibble(p[k].pair));
      out[2 * k + 1] = static_cast<A>(high_nibble(p[k].pair));
    }
    return out;
  } else if constexpr (std::is_same_v<T, int8_t>) {
#if defined(__AVX512F__)
    // otherwise GCC widens bytes one by one
    if constexpr (std::is_same_v<A, float>) {
      const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
      return reinterpret_cast<vec<A>>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(raw)));
    }
#elif defined(__AVX2__)
    if constexpr (std::is_same_v<A, float>) {
      const __m128i raw = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
      return reinterpret_cast<vec<A>>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(raw)));
    }
#elif defined(__SSE4_1__)
    if constexpr (std::is_same_v<A, float>) {
      int32_t raw;
      std::memcpy(&raw, p, sizeof raw);
      return reinterpret_cast<vec<A>>(_mm_cvtepi32_ps(_mm_cvtepi8_epi32(_mm_cvtsi32_si128(raw))));
    }
#endif
    typedef int8_t bytes __attribute__((vector_size(kLanes<A>)));
    bytes raw;
    std::memcpy(&raw, p, sizeof raw);
    return __builtin_convertvector(raw, vec<A>);
  } else {
    return load(p);
  }
}

// the last n channels of a row, at most kLanes<A>, the missing lanes zero
template <class A, class T>
inline vec<A> load_row(const T* p, int64_t n) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const auto mask = static_cast<uint16_t>((1u << n) - 1);
  if constexpr (std::is_same_v<T, float>) return reinterpret_cast<vec<A>>(_mm512_maskz_loadu_ps(mask, p));
  if constexpr (std::is_same_v<T, int8_t>) {
    const __m128i raw = _mm_maskz_loadu_epi8(mask, p);
    return load_row<A>(reinterpret_cast<const T*>(&raw));
  }
  if constexpr (std::is_same_v<T, nibbles> && std::is_same_v<A, float>) {
    const __m128i raw = _mm_maskz_loadu_epi8(static_cast<uint16_t>((1u << (n + 1) / 2) - 1), p);
    const vec<A> x = load_row<A>(reinterpret_cast<const T*>(&raw));
    // with an odd number of channels the last half byte is undefined
    return reinterpret_cast<vec<A>>(_mm512_maskz_mov_ps(mask, reinterpret_cast<__m512>(x)));
  }
  if constexpr (sizeof(T) == 2) {
    const __m256i raw = _mm256_maskz_loadu_epi16(mask, p);
    return load_row<A>(reinterpret_cast<const T*>(&raw));
  }
#endif
  if (n == kLanes<A>) return load_row<A>(p);
  T padded[kLanes<A>] = {};
  copy_few<kLanes<A> / 2>(padded, p, stored_elements<T>(n));
  vec<A> x = load_row<A>(padded);
  if constexpr (std::is_same_v<T, nibbles>)
    if (n < kLanes<A>) x[n] = A(0);
  return x;
}

// `lanes` channels of a row from d on, whole vectors where they fit
template <class A, class T>
inline vec<A> load_some_row(const T* row, int64_t d, int64_t lanes) {
  return lanes == kLanes<A> ? load_row<A>(channel(row, d)) : load_row<A>(channel(row, d), lanes);
}

// lanes in pairs, half the width at a time, as in sum()
inline void sum_four(vec<double> a, vec<double> b, vec<double> c, vec<double> d, double* out) {
  const double sums[] = {sum<double>(a), sum<double>(b), sum<double>(c), sum<double>(d)};
  std::memcpy(out, sums, sizeof sums);
}

typedef float quarter __attribute__((vector_size(16)));

template <class V>
inline quarter fold(V x) {
  if constexpr (sizeof(V) == 64) {
    typedef float half __attribute__((vector_size(32)));
    const half h = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
                   __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
    return fold(h);
  } else if constexpr (sizeof(V) == 32) {
    return __builtin_shufflevector(x, x, 0, 1, 2, 3) + __builtin_shufflevector(x, x, 4, 5, 6, 7);
  } else {
    return x;
  }
}

inline void sum_four(vec<float> a, vec<float> b, vec<float> c, vec<float> d, float* out) {
  const quarter p = fold(a), q = fold(b), r = fold(c), s = fold(d);
  const quarter pq = __builtin_shufflevector(p, q, 0, 1, 4, 5) + __builtin_shufflevector(p, q, 2, 3, 6, 7);
  const quarter rs = __builtin_shufflevector(r, s, 0, 1, 4, 5) + __builtin_shufflevector(r, s, 2, 3, 6, 7);
  const quarter sums = __builtin_shufflevector(pq, rs, 0, 2, 4, 6) + __builtin_shufflevector(pq, rs, 1, 3, 5, 7);
  std::memcpy(out, &sums, sizeof sums);
}

// The rows that a tile prefetches for a later one: those that are `rows` after its own rows first to last.
struct Ahead {
  int64_t rows;
  int first, last;
};

// f(0) ... f(N - 1) unrolled, because compile-time indices keep arrays of vectors in registers
template <int... I, class F>
__attribute__((always_inline)) inline void unrolled(std::integer_sequence<int, I...>, const F& f) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
__attribute__((always_inline)) inline void unrolled(const F& f) {
  unrolled(std::make_integer_sequence<int, N>{}, f);
}

template <class T>
constexpr int64_t kLineChannels = 64 / sizeof(T) * (std::is_same_v<T, nibbles> ? 2 : 1);

// dots[j * stride + r] = row r . query j, squares[r] = row r . row r. The queries are interleaved, kLanes of each in
// turn, and padded with zeros: one stream instead of Q keeps them from falling into one cache set.
template <int Q, bool kSquares, class A, class T>
void dot_tile(const T* const* row, const A* query, int64_t D, const Ahead& ahead, A* dots, int64_t stride, A* squares) {
  constexpr int64_t L = kLanes<A>;
  constexpr int R = kTileRows;
  vec<A> dot[Q * R], square[R];
  unrolled<Q * R>([&](auto i) __attribute__((always_inline)) { dot[i] = vec<A>{}; });
  unrolled<R>([&](auto i) __attribute__((always_inline)) { square[i] = vec<A>{}; });
  const T* const r[R] = {row[0], row[1], row[2], row[3]};
  const auto step = [&](const auto& channels) __attribute__((always_inline)) {
    vec<A> w[Q];
    unrolled<Q>([&](auto j) __attribute__((always_inline)) { w[j] = load(query + j * L); });
    query += Q * L;
    unrolled<R>([&](auto i) __attribute__((always_inline)) {
      const vec<A> x = channels(r[i]);
      if constexpr (kSquares) square[i] = multiply_add(x, x, square[i]);
      unrolled<Q>([&](auto j)
                      __attribute__((always_inline)) { dot[j * R + i] = multiply_add(x, w[j], dot[j * R + i]); });
    });
  };
  int64_t d = 0;
  for (; d + L <= D; d += L) {
    if (d % kLineChannels<T> == 0)
      for (int i = ahead.first; i < ahead.last; ++i) __builtin_prefetch(channel(row[ahead.rows + i], d), 0, 2);
    step([&](const T* p) __attribute__((always_inline)) { return load_row<A>(channel(p, d)); });
  }
  if (d < D) step([&](const T* p) __attribute__((always_inline)) { return load_row<A>(channel(p, d), D - d); });
  unrolled<Q>([&](auto j) __attribute__((always_inline)) {
    sum_four(dot[j * R], dot[j * R + 1], dot[j * R + 2], dot[j * R + 3], dots + j * stride);
  });
  if constexpr (kSquares) sum_four(square[0], square[1], square[2], square[3], squares);
}

template <class A, class T>
using DotTile = void (*)(const T* const*, const A*, int64_t, const Ahead&, A*, int64_t, A*);

// the tile of `queries` queries, at most kTileQueries, with squares one fewer
template <class A, class T, int Q = kTileQueries>
DotTile<A, T> dot_tile_of(int queries, bool squares) {
  if constexpr (Q > 1)
    if (queries < Q) return dot_tile_of<A, T, Q - 1>(queries, squares);
  if constexpr (Q < kTileQueries)
    if (squares) return dot_tile<Q, true, A, T>;
  return dot_tile<Q, false, A, T>;
}

}  // namespace vmemory
