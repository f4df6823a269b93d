// CUDA's device language for a C++ compiler: as much of it as vmemory's kernels use, over fibers of one host thread.
#pragma once

#include <math.h>

#include <bit>
#include <cstdint>
#include <cstring>
#include <source_location>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }

namespace simt {

// where a thread stands, for reports
using At = std::source_location;

// of the running fiber: nothing that happens between two calls changes them
[[gnu::const]] uint3 thread_index();
[[gnu::const]] uint3 block_index();
[[gnu::const]] uint3 block_size();
[[gnu::const]] uint3 grid_size();

enum class Exchange { kShuffle, kBallot, kSync };
uint64_t meet_warp(Exchange what, unsigned mask, uint64_t value, unsigned from, At at);
int meet_block(int predicate, At at);
void meet_grid(At at);
unsigned atomic_add(unsigned* at, unsigned x);
void fence();

// A block's array, told apart by the address of its tag.
void* shared_array(const void* tag, size_t bytes, size_t granule);
void* dynamic_array();

template <class T>
T& shared(const void* tag) {
  return *static_cast<T*>(shared_array(tag, sizeof(T), sizeof(std::remove_all_extents_t<T>)));
}

template <class T>
T shuffle(unsigned mask, T x, unsigned from, At at) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  memcpy(&bits, &x, sizeof x);
  bits = meet_warp(Exchange::kShuffle, mask, bits, from, at);
  memcpy(&x, &bits, sizeof x);
  return x;
}

}  // namespace simt

#define VMEMORY_SHARED(name, ...)   \
  static const char name##_tag = 0; \
  auto& name = simt::shared<__VA_ARGS__>(&name##_tag)

template <class T>
T* dynamic_shared() {
  return static_cast<T*>(simt::dynamic_array());
}

#define threadIdx (simt::thread_index())
#define blockIdx (simt::block_index())
#define blockDim (simt::block_size())
#define gridDim (simt::grid_size())

template <class T>
T __shfl_xor_sync(unsigned mask, T x, int k, simt::At at = simt::At::current()) {
  return simt::shuffle(mask, x, (threadIdx.x % 32) ^ static_cast<unsigned>(k), at);
}
template <class T>
T __shfl_up_sync(unsigned mask, T x, unsigned k, simt::At at = simt::At::current()) {
  const unsigned lane = threadIdx.x % 32;
  return simt::shuffle(mask, x, lane < k ? lane : lane - k, at);
}
template <class T>
T __shfl_sync(unsigned mask, T x, int from, simt::At at = simt::At::current()) {
  return simt::shuffle(mask, x, static_cast<unsigned>(from) % 32, at);
}
inline unsigned __ballot_sync(unsigned mask, int p, simt::At at = simt::At::current()) {
  return static_cast<unsigned>(simt::meet_warp(simt::Exchange::kBallot, mask, p != 0, 0, at));
}
inline void __syncwarp(unsigned mask = ~0u, simt::At at = simt::At::current()) {
  simt::meet_warp(simt::Exchange::kSync, mask, 0, 0, at);
}
inline void __syncthreads(simt::At at = simt::At::current()) { simt::meet_block(0, at); }
inline int __syncthreads_count(int p, simt::At at = simt::At::current()) { return simt::meet_block(p != 0, at); }
inline int __syncthreads_or(int p, simt::At at = simt::At::current()) { return simt::meet_block(p != 0, at) > 0; }
inline void __threadfence() { simt::fence(); }
inline unsigned atomicAdd(unsigned* at, unsigned x) { return simt::atomic_add(at, x); }
inline int atomicAdd(int* at, int x) {
  return static_cast<int>(simt::atomic_add(reinterpret_cast<unsigned*>(at), static_cast<unsigned>(x)));
}

namespace cooperative_groups {
struct grid_group {
  void sync(simt::At at = simt::At::current()) const { simt::meet_grid(at); }
};
inline grid_group this_grid() { return {}; }
}  // namespace cooperative_groups

template <class T>
T __ldg(const T* p) {
  return *p;
}
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
// the kernels are compiled with -ffp-contract=off, so that these round as their names say
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return __builtin_sqrtf(a); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}

struct __half {
  _Float16 x;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
inline __half __ushort_as_half(uint16_t x) { return {std::bit_cast<_Float16>(x)}; }
inline uint16_t __half_as_ushort(__half h) { return std::bit_cast<uint16_t>(h.x); }
inline float __half2float(__half h) { return static_cast<float>(h.x); }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }
inline __nv_bfloat16 __ushort_as_bfloat16(uint16_t x) { return {x}; }
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 h) { return h.bits; }
inline float __bfloat162float(__nv_bfloat16 h) { return std::bit_cast<float>(static_cast<uint32_t>(h.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
