// Portable vectors over GCC/Clang vector extensions, as wide as a register: one source for SSE, AVX2, AVX-512 and NEON.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__SSE4_1__)
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

// A vector fills one register of the level that this is compiled for. Arrays of wider ones are split by the compiler
// and kept in memory: a product of matrices is then ten times slower.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class A>
struct vec_of {
  typedef A type __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using vec = typename vec_of<A>::type;
template <class A>
constexpr int64_t kLanes = kVectorBytes / sizeof(A);

typedef uint16_t vec_u16 __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t vec_u32 __attribute__((vector_size(kVectorBytes)));

// one rounding if the processor supports it, independent of the compiler's contraction
inline vec<float> multiply_add(vec<float> a, vec<float> b, vec<float> c) {
#if defined(__AVX512F__)
  return reinterpret_cast<vec<float>>(
      _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__AVX2__) && defined(__FMA__)
  return reinterpret_cast<vec<float>>(
      _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#else
  return a * b + c;
#endif
}
inline vec<double> multiply_add(vec<double> a, vec<double> b, vec<double> c) {
#if defined(__AVX512F__)
  return reinterpret_cast<vec<double>>(
      _mm512_fmadd_pd(reinterpret_cast<__m512d>(a), reinterpret_cast<__m512d>(b), reinterpret_cast<__m512d>(c)));
#elif defined(__AVX2__) && defined(__FMA__)
  return reinterpret_cast<vec<double>>(
      _mm256_fmadd_pd(reinterpret_cast<__m256d>(a), reinterpret_cast<__m256d>(b), reinterpret_cast<__m256d>(c)));
#else
  return a * b + c;
#endif
}

inline vec_u16 load_u16(const void* p) {
  vec_u16 out;
  std::memcpy(&out, p, sizeof out);
  return out;
}

inline vec_u32 widen_u16(vec_u16 x) {
  // otherwise GCC widens the two halves separately
#if defined(__AVX512F__)
  return reinterpret_cast<vec_u32>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(x)));
#elif defined(__AVX2__)
  return reinterpret_cast<vec_u32>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(x)));
#elif defined(__SSE4_1__)
  return reinterpret_cast<vec_u32>(_mm_cvtepu16_epi32(_mm_cvtsi64_si128(std::bit_cast<int64_t>(x))));
#else
  return __builtin_convertvector(x, vec_u32);
#endif
}

// whole numbers below 2^16
inline vec_u16 narrow_u32(vec_u32 x) {
#if defined(__AVX512F__)
  return reinterpret_cast<vec_u16>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(x)));
#elif defined(__AVX2__)
  const __m256i halves = reinterpret_cast<__m256i>(x);
  return reinterpret_cast<vec_u16>(
      _mm_packus_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1)));
#elif defined(__SSE4_1__)
  const __m128i halves = reinterpret_cast<__m128i>(x);
  return std::bit_cast<vec_u16>(_mm_cvtsi128_si64(_mm_packus_epi32(halves, halves)));
#else
  return __builtin_convertvector(x, vec_u16);
#endif
}

inline vec<float> widen(const bf16* p) { return reinterpret_cast<vec<float>>(widen_u16(load_u16(p)) << 16); }

inline void narrow(bf16* p, vec<float> x) {
  const vec_u32 bits = reinterpret_cast<vec_u32>(x);
  // round to nearest even; a NaN must not round up into infinity
  const vec_u32 rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const auto is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const vec_u16 high = narrow_u32((is_nan ? (bits | 0x00400000u) : rounded) >> 16);
  std::memcpy(p, &high, sizeof high);
}

inline vec<float> widen(const f16* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<vec<float>>(_mm512_cvtph_ps(reinterpret_cast<__m256i>(load_u16(p))));
#elif defined(__AVX2__) && defined(__F16C__)
  return reinterpret_cast<vec<float>>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(load_u16(p))));
#else
  const vec_u32 bits = widen_u16(load_u16(p)), sign = (bits & 0x8000u) << 16, size = bits & 0x7fffu;
  // the exponent's bias differs by 112; infinity and NaN have the largest exponent in both; below 2^-14 the bits count
  // steps of 2^-24
  typedef int32_t ints __attribute__((vector_size(kVectorBytes)));
  const vec_u32 normal = (size << 13) + (112u << 23), special = (size << 13) | 0x7f800000u;
  const vec<float> small = __builtin_convertvector(reinterpret_cast<ints>(size), vec<float>) * 0x1p-24f;
  const vec_u32 large = size >= 0x7c00u ? special : normal;
  return reinterpret_cast<vec<float>>((size < 0x0400u ? reinterpret_cast<vec_u32>(small) : large) | sign);
#endif
}

inline void narrow(f16* p, vec<float> x) {
#if defined(__AVX512F__)
  const auto half = reinterpret_cast<vec_u16>(_mm512_cvtps_ph(reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__) && defined(__F16C__)
  const auto half = reinterpret_cast<vec_u16>(_mm256_cvtps_ph(reinterpret_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
#else
  const vec_u32 bits = reinterpret_cast<vec_u32>(x), sign = (bits >> 16) & 0x8000u, size = bits & 0x7fffffffu;
  const vec_u32 normal = (size + 0xfffu + ((size >> 13) & 1u) - (112u << 23)) >> 13;
  // below 2^-14 a step is 2^-24, which is what the last bit of 0.5 counts
  const vec<float> shifted = reinterpret_cast<vec<float>>(size) + 0.5f;
  const vec_u32 small = reinterpret_cast<vec_u32>(shifted) - 0x3f000000u;
  const vec_u32 special = size > 0x7f800000u ? (0x7e00u | ((size >> 13) & 0x3ffu)) : vec_u32{} + 0x7c00u;
  const vec_u32 large = size >= 0x477ff000u ? special : normal;
  const vec_u16 half = narrow_u32((size < 0x38800000u ? small : large) | sign);
#endif
  std::memcpy(p, &half, sizeof half);
}

// n < 2 * kMost elements in pieces of powers of two: a call to memcpy would cost every sum of the caller its register
template <int64_t kMost, class T>
inline void copy_few(T* to, const T* from, int64_t n) {
  if (n & kMost) {
    std::memcpy(to, from, kMost * sizeof(T));
    to += kMost, from += kMost;
  }
  if constexpr (kMost > 1) copy_few<kMost / 2>(to, from, n);
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

// the last n <= kLanes elements; missing lanes read as zero and are not written
template <class T>
inline vec<acc_t<T>> load(const T* p, int64_t n) {
  constexpr int64_t L = kLanes<acc_t<T>>;
  if (n == L) return load(p);
  T padded[L] = {};
  copy_few<L / 2>(padded, p, n);
  return load(padded);
}

template <class T>
inline void store(T* p, vec<acc_t<T>> x, int64_t n) {
  constexpr int64_t L = kLanes<acc_t<T>>;
  if (n == L) return store(p, x);
  T padded[L];
  store(padded, x);
  copy_few<L / 2>(p, padded, n);
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
  // a subtraction, because 0 + x differs for x = -0 and the compiler would emit the addition
  return x - vec<A>{};
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
    s0 = multiply_add(load(a + i), load(b + i), s0);
    s1 = multiply_add(load(a + i + L), load(b + i + L), s1);
    s2 = multiply_add(load(a + i + 2 * L), load(b + i + 2 * L), s2);
    s3 = multiply_add(load(a + i + 3 * L), load(b + i + 3 * L), s3);
  }
  for (; i + L <= n; i += L) s0 = multiply_add(load(a + i), load(b + i), s0);
  if (i < n) s1 = multiply_add(load(a + i, n - i), load(b + i, n - i), s1);
  return sum<A>((s0 + s1) + (s2 + s3));
}

}  // namespace vmemory
