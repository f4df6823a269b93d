// Token grids on the device, channels last: a thread makes a pack of channels of one cell.
#pragma once

#include "common/pool.h"
#include "pack.cuh"

namespace vmemory::pool {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

enum class Mode { kArea, kBilinear, kShuffle, kShuffleTransposed };

// H×W is the grid of the tokens, h×w the pooled one
struct Args {
  const void* in;
  void* out;
  const void* cell;  // [B, D], added to every cell of its frame, or null
  void* mean;        // [B, D]
  int64_t B, H, W, D, h, w;
};

template <class A, int V>
struct Sum {
  A x[V];

  __device__ Sum() {
#pragma unroll
    for (int v = 0; v < V; ++v) x[v] = A(0);
  }

  template <class T>
  __device__ void add(const Pack<T, V>& pack, A weight) {
#pragma unroll
    for (int v = 0; v < V; ++v) x[v] += weight * to_acc(pack.x[v]);
  }

  template <class T>
  __device__ void add(const Pack<T, V>& pack) {
#pragma unroll
    for (int v = 0; v < V; ++v) x[v] += to_acc(pack.x[v]);
  }

  template <class T>
  __device__ void store(T* to) const {
    Pack<T, V> pack;
#pragma unroll
    for (int v = 0; v < V; ++v) from_acc(x[v], &pack.x[v]);
    store_pack(to, pack);
  }
};

// channels d, d + 1, .. of pooled cell (i, j)
template <Mode kMode, int V, class T>
__device__ Sum<acc_t<T>, V> pooled(const Args& a, const T* frame, int64_t i, int64_t j, int64_t d) {
  using A = acc_t<T>;
  Sum<A, V> sum;
  if constexpr (kMode == Mode::kArea) {
    const int64_t y0 = window_begin(i, a.H, a.h), y1 = window_end(i, a.H, a.h);
    const int64_t x0 = window_begin(j, a.W, a.w), x1 = window_end(j, a.W, a.w);
    for (int64_t y = y0; y < y1; ++y) {
      // summed row by row, because large windows then round less
      Sum<A, V> across;
      const T* row = frame + y * a.W * a.D + d;
#pragma unroll 2
      for (int64_t x = x0; x < x1; ++x) across.add(load_pack<V>(row + x * a.D));
#pragma unroll
      for (int v = 0; v < V; ++v) sum.x[v] += across.x[v];
    }
    const A cells = static_cast<A>((y1 - y0) * (x1 - x0));
#pragma unroll
    for (int v = 0; v < V; ++v) sum.x[v] = sum.x[v] / cells;
  } else {
    const auto y = bilinear_taps<A>(i, a.H, a.h), x = bilinear_taps<A>(j, a.W, a.w);
    const T *low = frame + y.low * a.W * a.D + d, *high = frame + y.high * a.W * a.D + d;
    // a tap of weight 0 is not read, because 0 times infinity is NaN
    const auto across = [&](const T* row) {
      Sum<A, V> of;
      of.add(load_pack<V>(row + x.low * a.D), A(1) - x.high_weight);
      if (x.high_weight > A(0)) of.add(load_pack<V>(row + x.high * a.D), x.high_weight);
      return of;
    };
    sum = across(low);
    if (y.high_weight > A(0)) {
      const Sum<A, V> below = across(high);
#pragma unroll
      for (int v = 0; v < V; ++v) sum.x[v] = (A(1) - y.high_weight) * sum.x[v] + y.high_weight * below.x[v];
    }
  }
  return sum;
}

// f(pooled cell, weight) for every pooled cell along one axis that input cell y of n is a part of
template <Mode kMode, class A, class F>
__device__ void for_targets(int64_t y, int64_t n, int64_t m, const F& f) {
  if constexpr (kMode == Mode::kArea) {
    for (int64_t i = window_begin(y, m, n), end = window_end(y, m, n); i < end; ++i)
      f(i, A(1) / static_cast<A>(window_end(i, n, m) - window_begin(i, n, m)));
  } else {
    const int64_t first = (2 * y - 1) * m / (2 * n) - 1, begin = first < 0 ? 0 : first;
    const int64_t end = begin + (2 * m + n - 1) / n + 3;
    for (int64_t i = begin; i < end && i < m; ++i) {
      const auto taps = bilinear_taps<A>(i, n, m);
      const A weight = (taps.low == y ? A(1) - taps.high_weight : A(0)) + (taps.high == y ? taps.high_weight : A(0));
      if (weight > A(0)) f(i, weight);
    }
  }
}

// Minimum blocks of 1 throughout: left alone, ptxas spills the address arithmetic to fit one more block.
// a block makes one row of pooled cells
template <Mode kMode, int V, class T>
__global__ void __launch_bounds__(kThreads, 1) forward_kernel(Args a) {
  const int64_t b = blockIdx.x / a.h, i = blockIdx.x % a.h, packs = a.D / V;
  const T* frame = static_cast<const T*>(a.in) + b * a.H * a.W * a.D;
  T* row = static_cast<T*>(a.out) + (b * a.h + i) * a.w * a.D;
  for (int64_t item = threadIdx.x; item < a.w * packs; item += kThreads)
    pooled<kMode, V>(a, frame, i, item / packs, item % packs * V).store(row + item * V);
}

// a block makes one row of the gradient of the tokens
template <Mode kMode, int V, class T>
__global__ void __launch_bounds__(kThreads, 1) backward_kernel(Args a) {
  using A = acc_t<T>;
  const int64_t b = blockIdx.x / a.H, y = blockIdx.x % a.H, packs = a.D / V;
  const T* grad = static_cast<const T*>(a.in) + b * a.h * a.w * a.D;
  const A* cell = static_cast<const A*>(a.cell);
  T* row = static_cast<T*>(a.out) + (b * a.H + y) * a.W * a.D;
  for (int64_t item = threadIdx.x; item < a.W * packs; item += kThreads) {
    const int64_t x = item / packs, d = item % packs * V;
    Sum<A, V> sum;
    for_targets<kMode, A>(y, a.H, a.h, [&](int64_t i, A wy) {
      for_targets<kMode, A>(x, a.W, a.w,
                            [&](int64_t j, A wx) { sum.add(load_pack<V>(grad + (i * a.w + j) * a.D + d), wy * wx); });
    });
    if (cell)
#pragma unroll
      for (int v = 0; v < V; ++v) sum.x[v] += cell[b * a.D + d + v];
    sum.store(row + item * V);
  }
}

// Packs of a row that a block of statistics reads: a line of the cache, so that one frame is many blocks.
template <int V>
constexpr int kRowPacks = V > 1 ? 8 : kWarp;

// A block owns a few packs of channels of one frame: their mean, and their pooled cells while the frame's slice is
// still in the second-level cache.
template <Mode kMode, int V, class T>
__global__ void __launch_bounds__(kThreads, 1) stats_kernel(Args a) {
  using A = acc_t<T>;
  constexpr int kPacks = kRowPacks<V>, kRows = kThreads / kPacks, kChannels = kPacks * V;
  VMEMORY_SHARED(sums, A[kRows][kChannels]);
  const int pack = threadIdx.x % kPacks, first = threadIdx.x / kPacks;
  const int64_t slices = (a.D + kChannels - 1) / kChannels, b = blockIdx.x / slices;
  const int64_t d = blockIdx.x % slices * kChannels + pack * V, cells = a.H * a.W;
  const bool live = d < a.D;
  const T* frame = static_cast<const T*>(a.in) + b * cells * a.D;
  Sum<A, V> sum;
  if (live)
#pragma unroll 4
    for (int64_t n = first; n < cells; n += kRows) sum.add(load_pack<V>(frame + n * a.D + d));
#pragma unroll
  for (int v = 0; v < V; ++v) sums[first][pack * V + v] = sum.x[v];
  __syncthreads();
  A* mean = static_cast<A*>(a.mean) + b * a.D;
  for (int c = threadIdx.x; c < kChannels; c += kThreads) {
    const int64_t channel = blockIdx.x % slices * kChannels + c;
    if (channel >= a.D) break;
    A total = A(0);
#pragma unroll 8
    for (int row = 0; row < kRows; ++row) total += sums[row][c];
    mean[channel] = total / static_cast<A>(cells);
  }
  if constexpr (kMode == Mode::kArea || kMode == Mode::kBilinear) {
    T* out = static_cast<T*>(a.out) + b * a.h * a.w * a.D;
    if (live)
      for (int64_t n = first; n < a.h * a.w; n += kRows)
        pooled<kMode, V>(a, frame, n / a.w, n % a.w, d).store(out + n * a.D + d);
  }
}

// norm [B] of mean [B, D], a block a frame
template <class A>
__global__ void __launch_bounds__(kThreads, 1) norm_kernel(const A* mean, A* norm, int64_t D) {
  VMEMORY_SHARED(sums, A[kWarps]);
  A sum = A(0);
  for (int64_t d = threadIdx.x; d < D; d += kThreads) {
    const A x = mean[blockIdx.x * D + d];
    sum += x * x;
  }
  for (int k = kWarp / 2; k > 0; k /= 2) sum += __shfl_xor_sync(~0u, sum, k);
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kWarps; ++w) sum += sums[w];
    norm[blockIdx.x] = sqrt(sum);
  }
}

// cell (y, x) of a frame lies in quarter 2 (y % 2) + x % 2 of a shuffled cell; a block moves one row of cells
template <bool kInverse, int V, class T>
__global__ void __launch_bounds__(kThreads, 1) shuffle_kernel(Args a, bool transposed) {
  using A = acc_t<T>;
  const int64_t b = blockIdx.x / a.H, y = blockIdx.x % a.H, packs = a.D / V, cells = a.H * a.W;
  const T* in = static_cast<const T*>(a.in) + b * cells * a.D;
  T* out = static_cast<T*>(a.out) + b * cells * a.D;
  const A* cell = static_cast<const A*>(a.cell);
  for (int64_t item = threadIdx.x; item < a.W * packs; item += kThreads) {
    const int64_t x = item / packs, d = item % packs * V;
    const int64_t block = transposed ? x / 2 * (a.H / 2) + y / 2 : y / 2 * (a.W / 2) + x / 2;
    const int64_t plain = (y * a.W + x) * a.D + d, shuffled = (block * 4 + 2 * (y % 2) + x % 2) * a.D + d;
    auto pack = load_pack<V>(in + (kInverse ? shuffled : plain));
    if (kInverse && cell)
#pragma unroll
      for (int v = 0; v < V; ++v) from_acc(to_acc(pack.x[v]) + cell[b * a.D + d + v], &pack.x[v]);
    store_pack(out + (kInverse ? plain : shuffled), pack);
  }
}

}  // namespace vmemory::pool
