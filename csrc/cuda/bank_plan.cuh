// A whole video's decisions: every token read once for descriptors, then a block a stream replays the steps on them.
#pragma once

#include "bank_push.cuh"

namespace vmemory::bank {

template <class T>
struct DescribeArgs {
  using A = acc_t<T>;
  Geometry g;
  MapOffsets maps;
  AxisTable axes;  // rows and columns from a frame to the last tier, none when nothing is pooled
  const T* frames;
  const bool* valid;
  const A* table;
  A* seen;    // [S, T, R, K]
  T* pooled;  // [S, T, cells, D]
  int64_t slices, frames_per_stream;
};

// a block a slice of channels of a frame
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 2) describe_kernel(const __grid_constant__ DescribeArgs<T> a) {
  using A = acc_t<T>;
  unsigned char* const bank_shared = dynamic_shared<unsigned char>();
  const Geometry& g = a.g;
  const PushShared<A> shared(bank_shared, g);
  const int64_t f = blockIdx.x / a.slices, d0 = blockIdx.x % a.slices * kSlice, cells = g.H * g.W;
  const int source = g.entry_tier(f % a.frames_per_stream);
  if (source < 0) return;
  const T* frame = a.frames + f * cells * g.D;
  const bool* valid = a.valid ? a.valid + f * cells : nullptr;
  find_spans(a.axes, a.table, shared.spans);
  if (g.R > 1) find_shares(g, a.maps, a.table, source, shared.share);
  __syncthreads();
  if (d0 < g.K)
    read_slice<V>(g, frame, static_cast<T*>(nullptr),
                  {shared.share, valid, shared.tile, a.seen + f * g.R * g.K, source}, d0);
  if (a.axes.count == 0) return;
  const Axis<A> rows = axis_of(a.axes, 0, a.table, shared.spans), columns = axis_of(a.axes, 1, a.table, shared.spans);
  pool_slice<V>(frame, nullptr, valid, rows, columns, a.pooled + f * rows.m * columns.m * g.D, g.D, d0);
}

template <class A>
struct ReplayArgs {
  Geometry g;
  A* seen;
  A *descriptor, *norm, *link;
  int64_t* entry;
  double* clock;
  int64_t *order, *counter, *assign;
  const double* time;
  const bool* valid;
  int64_t frames_per_stream;
  bool staged;  // the stream's lists fit into shared memory
};

// a stream's lists in shared memory, widest type first
template <class A>
__host__ __device__ inline size_t staged_bytes(const Geometry& g) {
  return (g.M * 4 + g.M + kLength + kMaxTiers) * sizeof(int64_t) + g.M * 4 * sizeof(double) +
         (g.M * g.R + g.P) * sizeof(A);
}

// lane k ends with the sum over lanes of part[k], each by the tree of warp_sum
template <int half, class A>
__device__ void sum_trees(A* part) {
  const bool upper = threadIdx.x & half;
#pragma unroll
  for (int k = 0; k < half; ++k) {
    const A send = upper ? part[k] : part[k + half], keep = upper ? part[k + half] : part[k];
    part[k] = keep + __shfl_xor_sync(kAllLanes, send, half);
  }
  if constexpr (half > 1) sum_trees<half / 2>(part);
}

// Dot products of whole descriptors, by a warp, in the order of PartialDots: a tree over each slice's channels, then
// lane by lane over slices, then a tree. 32 trees at a time take 31 exchanges.
template <class A>
__device__ A dot_rows(const A* x, const A* y, int64_t K) {
  const int lane = lane_of();
  A sum = 0;
  for (int64_t base = 0; base < K; base += kWarp * kSlice) {
    A part[kWarp];
#pragma unroll
    for (int k = 0; k < kWarp; ++k) {
      const int64_t d = base + k * kSlice + lane;
      part[k] = d < K ? times(x[d], y[d]) : A(0);
    }
    sum_trees<kWarp / 2>(part);
    if (base + lane * kSlice < K) sum += part[0];
  }
  return warp_sum(sum);
}

// descriptors indexed by frame, so that none is copied
template <class A>
struct SeenDots {
  const Geometry& g;
  const Stream<A>& s;
  const Step& step;
  A* seen;        // [T, R, K]
  int64_t frame;  // the newest

  __device__ A* row(int64_t of, int64_t r) const { return seen + (of * g.R + r) * g.K; }
  // a merged slot's descriptor overwrites that of its first frame
  __device__ A* slot_row(int64_t slot, int64_t r) const { return row(s.entry[slot * 4 + kFrame], r); }
  __device__ A square(int r, bool merged) const {
    const A* x = merged ? slot_row(step.merged, 0) : row(frame, r);
    return dot_rows(x, x, g.K);
  }
  __device__ A product(int64_t, const Pair& pair) const {
    const int64_t r = g.descriptor_of(pair.tier);
    return dot_rows(slot_row(pair.a, r), slot_row(pair.b, r), g.K);
  }
};

// the slot each frame is in, before the step is committed
template <class A>
__device__ void relabel_by_block(const Stream<A>& s, const Step& step, int64_t frame, int64_t* assign) {
  if (step.first >= 0 && step.merged >= 0) {
    const int64_t first = s.entry[step.slot[0] * 4 + kFirst], last = s.entry[step.slot[0] * 4 + kLast];
    for (int64_t t = first + threadIdx.x; t <= last; t += blockDim.x)
      if (assign[t] == step.slot[0]) assign[t] = step.merged;
  } else if (step.first >= 0 && threadIdx.x < step.length) {
    assign[s.entry[step.slot[threadIdx.x] * 4 + kFrame]] = step.target[threadIdx.x];
  }
  if (threadIdx.x == 0) assign[frame] = step.first < 0 ? -1 : step.fresh;
}

template <class A>
__device__ void merge_seen(const SeenDots<A>& dots) {
  const Step& step = dots.step;
  if (step.merged < 0) return;
  const double x = dots.s.clock[step.merged * 4 + kMass], y = dots.s.clock[step.slot[0] * 4 + kMass];
  const A share = x + y > 0 ? static_cast<A>(x / (x + y)) : A(0.5);
  A* to = dots.slot_row(step.merged, 0);
  const A* from = dots.slot_row(step.slot[0], 0);
  for (int64_t d = threadIdx.x; d < dots.g.K; d += blockDim.x) to[d] = fma(share, to[d], (A(1) - share) * from[d]);
}

template <class X>
__device__ void copy_by_block(X* to, const X* from, int64_t n) {
  for (int64_t k = threadIdx.x; k < n; k += blockDim.x) to[k] = from[k];
}

template <class X>
__device__ void fill_by_block(X* to, X value, int64_t n) {
  for (int64_t k = threadIdx.x; k < n; k += blockDim.x) to[k] = value;
}

template <class A>
__global__ void __launch_bounds__(kThreads, 2) replay_kernel(const __grid_constant__ ReplayArgs<A> a) {
  unsigned char* const bank_shared = dynamic_shared<unsigned char>();
  const Geometry& g = a.g;
  Work<A>& work = *reinterpret_cast<Work<A>*>(bank_shared);
  const int64_t i = blockIdx.x, M = g.M, counters = kLength + g.tiers;
  const Stream<A> out{a.descriptor + i * M * g.R * g.K,
                      a.norm + i * M * g.R,
                      a.link + i * g.P,
                      a.entry + i * M * 4,
                      a.clock + i * M * 4,
                      a.order + i * M,
                      a.counter + i * counters};
  Stream<A> s = out;
  if (a.staged) {
    s.entry = reinterpret_cast<int64_t*>(bank_shared + (sizeof(Work<A>) + 15) / 16 * 16);
    s.order = s.entry + M * 4;
    s.counter = s.order + M;
    s.clock = reinterpret_cast<double*>(s.counter + kLength + kMaxTiers);
    s.norm = reinterpret_cast<A*>(s.clock + M * 4);
    s.link = s.norm + M * g.R;
  }
  fill_by_block(s.entry, static_cast<int64_t>(-1), M * 4);
  fill_by_block(s.order, static_cast<int64_t>(-1), M);
  fill_by_block(s.counter, static_cast<int64_t>(0), counters);
  fill_by_block(s.clock, 0.0, M * 4);
  fill_by_block(s.norm, A(0), M * g.R);
  fill_by_block(s.link, A(0), g.P);
  __syncthreads();

  A* seen = a.seen + i * a.frames_per_stream * g.R * g.K;
  for (int64_t n = 0; n < a.frames_per_stream; ++n) {
    decide_by_block(g, s, nullptr, work);
    const SeenDots<A> dots{g, s, work.step, seen, n};
    const int64_t f = i * a.frames_per_stream + n, cells = g.H * g.W;
    if (warp_of() == 0) {
      const int64_t count = count_valid(g, a.valid ? a.valid + f * cells : nullptr);
      if (lane_of() == 0) work.cells = count;
    }
    relabel_by_block(s, work.step, n, a.assign + i * a.frames_per_stream);
    if (work.step.first >= 0) merge_seen(dots);
    __syncthreads();
    commit_by_block(g, s, work, dots, a.time ? a.time[f] : static_cast<double>(NAN), static_cast<double>(work.cells));
    __syncthreads();
  }

  if (a.staged) {
    copy_by_block(out.entry, s.entry, M * 4);
    copy_by_block(out.order, s.order, M);
    copy_by_block(out.counter, s.counter, counters);
    copy_by_block(out.clock, s.clock, M * 4);
    copy_by_block(out.norm, s.norm, M * g.R);
    copy_by_block(out.link, s.link, g.P);
  }
  for (int64_t k = threadIdx.x; k < M * g.R * g.K; k += blockDim.x) {
    const int64_t frame = s.entry[k / (g.R * g.K) * 4 + kFrame];
    out.descriptor[k] = frame < 0 ? A(0) : seen[frame * g.R * g.K + k % (g.R * g.K)];
  }
}

}  // namespace vmemory::bank
