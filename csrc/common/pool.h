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

// the two taps of interpolate(mode="bilinear", align_corners=False) for output cell i
template <class A>
struct Taps {
  int64_t low, high;
  A high_weight;
};

template <class A = float>
VMEMORY_HD inline Taps<A> bilinear_taps(int64_t i, int64_t n, int64_t m) {
  const A scale = static_cast<A>(n) / static_cast<A>(m);
  A at = scale * (static_cast<A>(i) + A(0.5)) - A(0.5);
  at = at < A(0) ? A(0) : at;
  const int64_t low = static_cast<int64_t>(at) < n - 1 ? static_cast<int64_t>(at) : n - 1;
  const int64_t high = low + 1 < n ? low + 1 : low;
  const A over = at - static_cast<A>(low);
  return {low, high, over < A(1) ? over : A(1)};
}

}  // namespace vmemory
