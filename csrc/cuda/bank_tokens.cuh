// One frame's tokens on the device: a block owns a slice of channels and reduces, copies and sums it.
#pragma once

#include "common/bank.h"
#include "pack.cuh"

namespace vmemory::bank {

constexpr int kWarp = 32;
constexpr int kThreads = 256;  // a warp for each tier and for each descriptor of a slot
constexpr int kSlice = kWarp;  // channels of a block: one a lane where descriptors are summed
constexpr int kTaps = 4;       // source cells of an output cell read at a time
constexpr int kMaxAxes = 4 * kMaxTiers;
static_assert(kThreads / kWarp >= kMaxTiers);
// cells staged at a time: 16 KiB
template <class A>
constexpr int kTile = 512 / sizeof(A);

// dense weights [m, n] of one axis in device memory
struct AxisSpec {
  int64_t weight;  // where they begin in the table
  int n, m;
  int span;  // where the spans of its rows begin in shared memory
};

// the axes that a launch reduces along
struct AxisTable {
  AxisSpec axis[kMaxAxes];
  int count = 0, spans = 0;

  int add(int64_t weight, int64_t n, int64_t m) {
    axis[count] = {weight, static_cast<int>(n), static_cast<int>(m), spans};
    spans += static_cast<int>(m);
    return count++;
  }
};

template <class A>
struct Axis {
  const A* weight;
  const int2* span;  // begin and end of each row's nonzeros
  int n, m;
};

template <class A>
__device__ Axis<A> axis_of(const AxisTable& axes, int i, const A* table, const int2* spans) {
  const AxisSpec& spec = axes.axis[i];
  return {table + spec.weight, spans + spec.span, spec.n, spec.m};
}

// a warp an axis, a lane a row
template <class A>
__device__ void find_spans(const AxisTable& axes, const A* table, int2* spans) {
  const int warps = blockDim.x / kWarp;
  for (int a = threadIdx.x / kWarp; a < axes.count; a += warps) {
    const AxisSpec& spec = axes.axis[a];
    for (int i = threadIdx.x % kWarp; i < spec.m; i += kWarp) {
      const A* row = table + spec.weight + static_cast<int64_t>(i) * spec.n;
      int begin = spec.n, end = 0;
      for (int k = 0; k < spec.n; ++k)
        if (row[k] != A(0)) {
          begin = begin < k ? begin : k;
          end = k + 1;
        }
      spans[spec.span + i] = make_int2(begin, end);
    }
  }
}

// weight of each source cell of output cell (i, j): mass is float [n * n'], valid bool, either may be null
template <class A>
struct Window {
  const Axis<A>&rows, &columns;
  int i, j;
  const float* mass;
  const bool* valid;

  // f(source cells, weights without and with masses), kTaps at a time in raster order; weight 0 = no cell
  template <class F>
  __device__ void each(const F& f) const {
    const int2 ys = rows.span[i], xs = columns.span[j];
    const int count = (ys.y - ys.x) * (xs.y - xs.x);
    int y = ys.x, x = xs.x;
    for (int t = 0; t < count; t += kTaps) {
      int cell[kTaps];
      A share[kTaps], weight[kTaps];
#pragma unroll
      for (int k = 0; k < kTaps; ++k) {
        const bool in = t + k < count;
        cell[k] = in ? y * columns.n + x : 0;
        share[k] = in ? rows.weight[i * rows.n + y] * columns.weight[j * columns.n + x] : A(0);
        if (++x == xs.y) x = xs.x, ++y;
      }
#pragma unroll
      for (int k = 0; k < kTaps; ++k) {
        weight[k] = share[k];
        if (mass && share[k] != A(0)) weight[k] *= static_cast<A>(mass[cell[k]]);
        if (valid && !valid[cell[k]]) weight[k] = A(0);
      }
      f(cell, share, weight);
    }
  }
  __device__ A held() const {
    A sum = 0;
    each([&](const int*, const A*, const A* weight) {
#pragma unroll
      for (int k = 0; k < kTaps; ++k) sum += weight[k];
    });
    return sum;
  }
};

// tokens [n, n', D] to [m, m', D], the block's slice of channels; cells without mass do not count
template <int V, class T>
__device__ void pool_slice(const T* in, const float* mass, const bool* valid, const Axis<acc_t<T>>& rows,
                           const Axis<acc_t<T>>& columns, T* out, int64_t D, int64_t d0) {
  using A = acc_t<T>;
  constexpr int lanes = kSlice / V;
  const int64_t d = d0 + threadIdx.x % lanes * V;
  if (d >= D) return;
  const int cells = rows.m * columns.m;
  for (int cell = threadIdx.x / lanes; cell < cells; cell += kThreads / lanes) {
    const Window<A> window{rows, columns, cell / columns.m, cell % columns.m, mass, valid};
    A held = 0, sum[V] = {};
    window.each([&](const int* from, const A* share, const A* weight) {
      // loads depend on the weights only, not on the masses
      Pack<T, V> x[kTaps] = {};
#pragma unroll
      for (int k = 0; k < kTaps; ++k)
        if (share[k] != A(0)) x[k] = load_pack<V>(in + from[k] * D + d);
#pragma unroll
      for (int k = 0; k < kTaps; ++k) {
        held += weight[k];
#pragma unroll
        for (int v = 0; v < V; ++v) sum[v] += weight[k] == A(0) ? A(0) : to_acc(x[k].x[v]) * weight[k];
      }
    });
    Pack<T, V> result;
#pragma unroll
    for (int v = 0; v < V; ++v) from_acc(held == A(1) || held == A(0) ? sum[v] : sum[v] / held, &result.x[v]);
    store_pack(out + cell * D + d, result);
  }
}

// x = wa * x + (1 - wa) * y for each token, wa its share of the two masses
template <int V, class T>
__device__ void merge_slice(T* x, const T* y, const float* mass_x, const float* mass_y, int64_t cells, int64_t D,
                            int64_t d0) {
  using A = acc_t<T>;
  constexpr int lanes = kSlice / V;
  const int64_t d = d0 + threadIdx.x % lanes * V;
  if (d >= D) return;
  for (int64_t cell = threadIdx.x / lanes; cell < cells; cell += kThreads / lanes) {
    const A mx = mass_x[cell], my = mass_y[cell];
    if (my == A(0)) continue;
    const A wx = mx / (mx + my);
    Pack<T, V> a = load_pack<V>(x + cell * D + d);
    const Pack<T, V> b = load_pack<V>(y + cell * D + d);
#pragma unroll
    for (int v = 0; v < V; ++v) from_acc(to_acc(a.x[v]) * wx + to_acc(b.x[v]) * (A(1) - wx), &a.x[v]);
    store_pack(x + cell * D + d, a);
  }
}

template <class A>
struct Describe {
  const A* share;  // [R, H + W] weight of each row, then of each column, of the input; null when R = 1
  const bool* valid;
  A* tile;  // [kTile<A>, kSlice]
  A* out;   // [R, K]
  int source;
};

// a descriptor's weights for rows and columns of the input: the mean in its tier
template <class A>
__device__ void find_shares(const Geometry& g, const MapOffsets& maps, const A* table, int source, A* share) {
  const int sides = static_cast<int>(g.H + g.W);
  for (int k = threadIdx.x; k < g.R * sides; k += blockDim.x) {
    const int r = k / sides, at = k % sides;
    if (r < source) continue;
    const bool row = at < g.H;
    const int64_t m = row ? g.height[r] : g.width[r], n = row ? g.H : g.W, c = row ? at : at - g.H;
    const A* weight = table + (row ? maps.rows[source][r] : maps.columns[source][r]) + c;
    A sum = 0;
    for (int64_t i = 0; i < m; ++i) sum += weight[i * n];
    share[k] = sum / static_cast<A>(m);
  }
}

// one channel of staged grid rows, `row` cells each, in groups of four cells as the host adds them
template <class A>
__device__ void add_plain(const A* tile, int count, int row, A* sum) {
  for (int y = 0; y < count; y += row) {
    const A* t = tile + y * kSlice;
    int x = 0;
#pragma unroll 4
    for (; x + 4 <= row; x += 4, t += 4 * kSlice) *sum += (t[0] + t[kSlice]) + (t[2 * kSlice] + t[3 * kSlice]);
    if (row - x == 3) *sum += (t[0] + t[kSlice]) + t[2 * kSlice];
    if (row - x == 2) *sum += t[0] + t[kSlice];
    if (row - x == 1) *sum += t[0];
  }
}

// Reads the block's slice of a frame once: copies it to `copy` unless null and sums its descriptors in the host's
// order, so that both decide alike. A warp a descriptor, a lane a channel.
template <int V, class T>
__device__ void read_slice(const Geometry& g, const T* frame, T* copy, const Describe<acc_t<T>>& to, int64_t d0) {
  using A = acc_t<T>;
  constexpr int lanes = kSlice / V, tile = kTile<A>, loads = tile * lanes / kThreads;
  const int lane = threadIdx.x % lanes, cells = static_cast<int>(g.H * g.W), W = static_cast<int>(g.W);
  const int r = threadIdx.x / kWarp, channel = threadIdx.x % kWarp;
  const int64_t d = d0 + lane * V;
  const bool described = d0 < g.K, sums = described && r < g.R && d0 + channel < g.K && (g.R == 1 || r >= to.source);
  const auto cell_of = [&](int k) { return static_cast<int>(threadIdx.x) / lanes + k * (kThreads / lanes); };
  const bool plain = g.R == 1 && g.K == g.D && !to.valid;
  A sum = 0, total = 0;
  Pack<T, V> next[loads] = {};
  // whole grid rows, or a piece of one that is longer than a tile
  const auto count_at = [&](int base) {
    const int most = W <= tile ? tile / W * W : tile, left = W <= tile ? cells - base : W - base % W;
    return most < left ? most : left;
  };
  const auto fetch = [&](int base, int count) {
#pragma unroll
    for (int k = 0; k < loads; ++k)
      if (d < g.D && cell_of(k) < count) next[k] = load_pack<V>(frame + (base + cell_of(k)) * g.D + d);
  };
  int count = count_at(0);
  fetch(0, count);
  for (int base = 0, after; base < cells; base += count, count = after) {
#pragma unroll
    for (int k = 0; k < loads; ++k) {
      if (d >= g.D || cell_of(k) >= count) continue;
      if (copy) store_pack(copy + (base + cell_of(k)) * g.D + d, next[k]);
      if (described)
#pragma unroll
        for (int v = 0; v < V; ++v) to.tile[cell_of(k) * kSlice + lane * V + v] = to_acc(next[k].x[v]);
    }
    after = base + count < cells ? count_at(base + count) : 0;
    fetch(base + count, after);
    if (!described) continue;
    __syncthreads();
    if (sums && plain) {
      total += static_cast<A>(count);
      add_plain(to.tile + channel, count, W <= tile ? W : count, &sum);
    } else if (sums) {
      const A* rows = to.share + r * (g.H + g.W);
      for (int c = 0; c < count; ++c) {
        if (to.valid && !to.valid[base + c]) continue;
        const A w = g.R == 1 ? A(1) : rows[(base + c) / W] * rows[g.H + (base + c) % W];
        if (w == A(0)) continue;
        total += w;
        sum += to.tile[c * kSlice + channel] * w;
      }
    }
    if (after > 0) __syncthreads();
  }
  if (described && r < g.R && d0 + channel < g.K) to.out[r * g.K + d0 + channel] = total == A(0) ? sum : sum / total;
}

}  // namespace vmemory::bank
