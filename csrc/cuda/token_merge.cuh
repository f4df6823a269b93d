// Sums of the rows that a plan joins, and tokens spread over their rows: a block a token and a slice of its channels.
#pragma once

#include "pack.cuh"

namespace vmemory::merging {

constexpr int kThreads = 128;

// the weight of a row in its token: 1 for a single row, equal for rows whose sizes sum to 0
template <class A>
__device__ A share_of(A size, A total, int64_t count) {
  if (count == 1) return A(1);
  return total > A(0) ? size / total : A(1) / static_cast<A>(count);
}

// a number of a plan, clamped to [low, high], because checking a plan would wait for the device
__device__ inline int64_t inside(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

template <class T>
struct SumArgs {
  const T* x;                    // [streams, M, D]
  const acc_t<T>* size;          // [streams, M], or null: every row counts as one
  const int64_t *order, *start;  // [streams, M], [streams, N + 1]
  T* out;                        // [streams, N, D]
  acc_t<T>* total;               // [streams, N], or null: sums instead of means
  int64_t M, N, D, slices;
};

template <class T, int V>
__global__ void __launch_bounds__(kThreads) token_sum_kernel(const __grid_constant__ SumArgs<T> a) {
  using A = acc_t<T>;
  const int64_t token = blockIdx.x / a.slices, slice = blockIdx.x % a.slices, stream = token / a.N;
  const int64_t d = (slice * kThreads + threadIdx.x) * V;
  const int64_t* start = a.start + stream * (a.N + 1) + token % a.N;
  const int64_t first = inside(start[0], 0, a.M), count = inside(start[1], first, a.M) - first;
  const int64_t* order = a.order + stream * a.M + first;
  const auto row = [&](int64_t i) { return inside(order[i], 0, a.M - 1); };
  const A* size = a.size ? a.size + stream * a.M : nullptr;
  A total = static_cast<A>(count);
  if (size) {
    total = A(0);
    for (int64_t i = 0; i < count; ++i) total += size[row(i)];
  }
  if (a.total && slice == 0 && threadIdx.x == 0) a.total[token] = total;
  if (d >= a.D) return;
  const T* x = a.x + stream * a.M * a.D + d;
  if (count == 1) {
    store_pack(a.out + token * a.D + d, load_pack<V>(x + row(0) * a.D));
    return;
  }
  A sum[V] = {};
  for (int64_t i = 0; i < count; ++i) {
    const A weight = a.total ? share_of(size ? size[row(i)] : A(1), total, count) : A(1);
    const Pack<T, V> held = load_pack<V>(x + row(i) * a.D);
#pragma unroll
    for (int v = 0; v < V; ++v) sum[v] += to_acc(held.x[v]) * weight;
  }
  Pack<T, V> out;
#pragma unroll
  for (int v = 0; v < V; ++v) from_acc(sum[v], out.x + v);
  store_pack(a.out + token * a.D + d, out);
}

template <class T>
struct SpreadArgs {
  const T* x;             // [streams, N, D]
  const acc_t<T>* size;   // [streams, M], or null
  const acc_t<T>* total;  // [streams, N], or null: copies instead of shares
  const int64_t *place, *start;
  T* out;  // [streams, M, D]
  int64_t M, N, D, slices;
};

template <class T, int V>
__global__ void __launch_bounds__(kThreads) token_spread_kernel(const __grid_constant__ SpreadArgs<T> a) {
  using A = acc_t<T>;
  const int64_t row = blockIdx.x / a.slices, stream = row / a.M;
  const int64_t d = (blockIdx.x % a.slices * kThreads + threadIdx.x) * V;
  if (d >= a.D) return;
  const int64_t token = inside(a.place[row], 0, a.N - 1);
  Pack<T, V> held = load_pack<V>(a.x + (stream * a.N + token) * a.D + d);
  if (a.total) {
    const int64_t* start = a.start + stream * (a.N + 1) + token;
    const int64_t count = start[1] - start[0];
    const A share = share_of(a.size ? a.size[row] : A(1), a.total[stream * a.N + token], count);
    if (count > 1)
#pragma unroll
      for (int v = 0; v < V; ++v) from_acc(to_acc(held.x[v]) * share, held.x + v);
  }
  store_pack(a.out + row * a.D + d, held);
}

}  // namespace vmemory::merging
