// Elements and 16-byte packs of them, read from and written to device memory.
#pragma once

#include <cstring>

#include "common/vec.h"
#include "cuda/language.cuh"

namespace vmemory {

__device__ inline float to_acc(bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
__device__ inline float to_acc(f16 x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ inline float to_acc(float x) { return x; }
__device__ inline double to_acc(double x) { return x; }

__device__ inline void from_acc(float x, bf16* to) { to->bits = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
__device__ inline void from_acc(float x, f16* to) { to->bits = __half_as_ushort(__float2half_rn(x)); }
__device__ inline void from_acc(float x, float* to) { *to = x; }
__device__ inline void from_acc(double x, double* to) { *to = x; }

template <class T, int V>
struct Pack {
  T x[V];
};

template <int V, class T>
__device__ inline Pack<T, V> load_pack(const T* p) {
  Pack<T, V> out;
  if constexpr (V * sizeof(T) == sizeof(uint4)) {
    const uint4 raw = *reinterpret_cast<const uint4*>(p);
    memcpy(&out, &raw, sizeof raw);
  } else {
    static_assert(V == 1);
    out.x[0] = *p;
  }
  return out;
}

template <class T, int V>
__device__ inline void store_pack(T* p, const Pack<T, V>& x) {
  if constexpr (V * sizeof(T) == sizeof(uint4)) {
    uint4 raw;
    memcpy(&raw, &x, sizeof raw);
    *reinterpret_cast<uint4*>(p) = raw;
  } else {
    *p = x.x[0];
  }
}

}  // namespace vmemory
