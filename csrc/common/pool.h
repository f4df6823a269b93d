// Windows of adaptive pooling on a token grid, host and device.
#pragma once

#include <cstdint>

#ifndef VMEMORY_HD
#ifdef __CUDACC__
#define VMEMORY_HD __host__ __device__
#else
#define VMEMORY_HD
#endif
#endif

namespace vmemory {

// adaptive_avg_pool's window of output cell i: [floor(i n / m), ceil((i + 1) n / m)).
// With n and m swapped: the output cells whose windows hold input cell i.
VMEMORY_HD inline int64_t window_begin(int64_t i, int64_t n, int64_t m) { return i * n / m; }
VMEMORY_HD inline int64_t window_end(int64_t i, int64_t n, int64_t m) { return ((i + 1) * n + m - 1) / m; }

// the two taps of interpolate(mode="bilinear", align_corners=False) for output cell i; where the high one has weight 0
// the low one stands alone
template <class A>
struct Taps {
  int64_t low, high;
  A high_weight;
};

// In whole numbers: a tap that lies exactly on a cell does so for every compiler, and reads no neighbour.
template <class A = float>
VMEMORY_HD inline Taps<A> bilinear_taps(int64_t i, int64_t n, int64_t m) {
  // twice m times n (i + 0.5) / m - 0.5
  const int64_t at = (2 * i + 1) * n - m, low = at > 0 ? at / (2 * m) : 0;
  if (at <= 0 || low + 1 >= n) return {low < n ? low : n - 1, low < n ? low : n - 1, A(0)};
  return {low, low + 1, static_cast<A>(at - low * 2 * m) / static_cast<A>(2 * m)};
}

}  // namespace vmemory
