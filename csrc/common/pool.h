// Windows of adaptive pooling on a token grid, host and device.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define VMEMORY_HD __host__ __device__
#else
#define VMEMORY_HD
#endif

namespace vmemory {

// adaptive_avg_pool's window of output cell i: [floor(i n / m), ceil((i + 1) n / m))
VMEMORY_HD inline int64_t window_begin(int64_t i, int64_t n, int64_t m) { return i * n / m; }
VMEMORY_HD inline int64_t window_end(int64_t i, int64_t n, int64_t m) { return ((i + 1) * n + m - 1) / m; }

// the two taps of interpolate(mode="bilinear", align_corners=False) for output cell i
struct Taps {
  int64_t low, high;
  float high_weight;
};

VMEMORY_HD inline Taps bilinear_taps(int64_t i, int64_t n, int64_t m) {
  const float scale = static_cast<float>(n) / static_cast<float>(m);
  float at = scale * (static_cast<float>(i) + 0.5f) - 0.5f;
  at = at < 0.0f ? 0.0f : at;
  const int64_t low = static_cast<int64_t>(at) < n - 1 ? static_cast<int64_t>(at) : n - 1;
  const int64_t high = low + 1 < n ? low + 1 : low;
  return {low, high, at - static_cast<float>(low)};
}

}  // namespace vmemory
