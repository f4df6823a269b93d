// Portable 64-byte vectors over GCC/Clang vector extensions: one source for SSE, AVX2 and AVX-512.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace vmemory {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
// two channels in 4 bits each, in two's complement: the even one in the low half
struct nibbles {
  uint8_t pair;
};
template <class T>
constexpr bool kQuantized = std::is_same_v<T, int8_t> || std::is_same_v<T, nibbles>;

// the type sums are kept in: float for every storage type but double
template <class T>
struct accumulate {
  using type = float;
};
template <>
struct accumulate<double> {
  using type = double;
};
template <class T>
using acc_t = typename accumulate<T>::type;

template <class A>
struct vec_of {
  typedef A type __attribute__((vector_size(64)));
};
template <class A>
using vec = typename vec_of<A>::type;
template <class A>
constexpr int64_t kLanes = 64 / sizeof(A);

typedef uint16_t vec_u16 __attribute__((vector_size(32)));
typedef uint32_t vec_u32 __attribute__((vector_size(64)));

inline vec<float> widen(const bf16* p) {
#if defined(__AVX512F__)
  // GCC widens the two halves apart otherwise
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
  return reinterpret_cast<vec<float>>(wide);
#else
  vec_u16 raw;
  std::memcpy(&raw, p, sizeof raw);
  const vec_u32 bits = __builtin_convertvector(raw, vec_u32) << 16;
  vec<float> out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
#endif
}

inline void narrow(bf16* p, vec<float> x) {
  vec_u32 bits;
  std::memcpy(&bits, &x, sizeof bits);
  // round to nearest even; a NaN must not round up into infinity
  const vec_u32 rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const auto is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const vec_u32 high = (is_nan ? (bits | 0x00400000u) : rounded) >> 16;
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(high)));
#else
  const vec_u16 raw = __builtin_convertvector(high, vec_u16);
  std::memcpy(p, &raw, sizeof raw);
#endif
}

inline vec<float> widen(const f16* p) {
  vec<float> out;
#if defined(__AVX512F__)
  const __m512 wide = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  std::memcpy(&out, &wide, sizeof out);
#elif defined(__F16C__)
  __m256 half[2];
  for (int i = 0; i < 2; ++i) half[i] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8 * i)));
  std::memcpy(&out, half, sizeof out);
#else
  for (int i = 0; i < 16; ++i) {
    _Float16 h;
    std::memcpy(&h, p + i, sizeof h);
    out[i] = static_cast<float>(h);
  }
#endif
  return out;
}

inline void narrow(f16* p, vec<float> x) {
#if defined(__AVX512F__)
  __m512 wide;
  std::memcpy(&wide, &x, sizeof wide);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  __m256 half[2];
  std::memcpy(half, &x, sizeof half);
  for (int i = 0; i < 2; ++i)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8 * i), _mm256_cvtps_ph(half[i], _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < 16; ++i) {
    const _Float16 h = static_cast<_Float16>(x[i]);
    std::memcpy(p + i, &h, sizeof h);
  }
#endif
}

// load(p) and store(p, x): kLanes elements of storage type T as accumulation vectors
template <class T>
inline vec<acc_t<T>> load(const T* p) {
  if constexpr (sizeof(T) == 2) {
    return widen(p);
  } else {
    vec<T> out;
    std::memcpy(&out, p, sizeof out);
    return out;
  }
}

template <class T>
inline void store(T* p, vec<acc_t<T>> x) {
  if constexpr (sizeof(T) == 2) {
    narrow(p, x);
  } else {
    std::memcpy(p, &x, sizeof x);
  }
}

// the last n < kLanes elements; missing lanes read as zero and are not written
template <class T>
inline vec<acc_t<T>> load(const T* p, int64_t n) {
  T padded[kLanes<acc_t<T>>] = {};
  std::memcpy(padded, p, n * sizeof(T));
  return load(padded);
}

template <class T>
inline void store(T* p, vec<acc_t<T>> x, int64_t n) {
  T padded[kLanes<acc_t<T>>];
  store(padded, x);
  std::memcpy(p, padded, n * sizeof(T));
}

// pairwise, so that the error grows with log2 of the lanes
template <class A>
inline A sum(vec<A> x) {
  A part[kLanes<A>];
  std::memcpy(part, &x, sizeof x);
  for (int64_t width = kLanes<A> / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; ++i) part[i] += part[i + width];
  return part[0];
}

template <class A>
inline vec<A> broadcast(A x) {
  return vec<A>{} + x;
}

// one order of summation whatever the address: identical rows score bit-identically wherever they lie
template <class T, class U>
inline acc_t<T> dot(const T* a, const U* b, int64_t n) {
  static_assert(std::is_same_v<acc_t<T>, acc_t<U>>);
  using A = acc_t<T>;
  constexpr int64_t L = kLanes<A>;
  vec<A> s0{}, s1{}, s2{}, s3{};
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L) {
    s0 += load(a + i) * load(b + i);
    s1 += load(a + i + L) * load(b + i + L);
    s2 += load(a + i + 2 * L) * load(b + i + 2 * L);
    s3 += load(a + i + 3 * L) * load(b + i + 3 * L);
  }
  for (; i + L <= n; i += L) s0 += load(a + i) * load(b + i);
  if (i < n) s1 += load(a + i, n - i) * load(b + i, n - i);
  return sum<A>((s0 + s1) + (s2 + s3));
}

}  // namespace vmemory
