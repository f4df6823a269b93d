// Writing past the caches.
#pragma once

#include "common/vec.h"

namespace vmemory {

// A larger result is evicted from the caches before it is read again. Written past them, its lines are not
// fetched first, which is a third of a copy's traffic.
constexpr int64_t kStreamedBytes = int64_t(1) << 25;

// whether rows of `pitch` elements at `out`, `bytes` in all, are large enough and aligned for `stream`
template <class T>
inline bool worth_streaming(const T* out, int64_t pitch, int64_t bytes) {
  return sizeof(T) >= 4 && bytes > kStreamedBytes && reinterpret_cast<uintptr_t>(out) % kVectorBytes == 0 &&
         pitch * sizeof(T) % kVectorBytes == 0;
}

// A whole aligned vector. The thread must call `finish_streams` before another thread reads the result.
template <class A>
inline void stream(A* p, vec<A> x) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), reinterpret_cast<__m512i>(x));
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(x));
#elif defined(__SSE4_1__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), reinterpret_cast<__m128i>(x));
#else
  std::memcpy(p, &x, sizeof x);
#endif
}

inline void finish_streams() {
#if defined(__SSE4_1__)
  _mm_sfence();
#endif
}

}  // namespace vmemory
