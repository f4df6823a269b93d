// Frames into memories of fixed slots: the next one in turn, or the one most similar to the frame. Torch-free.
#pragma once

#include "bank_tokens.cuh"
#include "common/choice.h"

namespace vmemory::ring {

using bank::kWarp;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kCopies = 4;           // units of a copy that a thread has in flight
constexpr int64_t kChunk = 1 << 13;  // values of a frame that a block compares at a time
constexpr int64_t kNone = int64_t(-1);

__device__ inline int lane() { return threadIdx.x % kWarp; }
__device__ inline int warp() { return threadIdx.x / kWarp; }

// the stream a row of frames goes to, negative for none
__device__ inline int64_t target(const int64_t* streams, int64_t row, int64_t S) {
  const int64_t stream = streams ? streams[row] : row;
  return stream < S ? stream : kNone;
}

// A stream's counter, to which `added` frames are added. A value below 0 or too large counts as the nearest possible
// one, because checking it on the host would wait for the device.
__device__ inline int64_t counted(const int64_t* count, int64_t stream, int64_t added) {
  const int64_t n = count[stream], most = INT64_MAX - added;
  return n < 0 ? 0 : n > most ? most : n;
}

// one piece of a frame of `units`, by a block
template <class Unit>
__device__ void copy_piece(const Unit* from, Unit* to, int64_t units, int64_t piece) {
  const int64_t first = piece * kCopies * kThreads + threadIdx.x;
  Unit held[kCopies];
#pragma unroll
  for (int k = 0; k < kCopies; ++k)
    if (first + k * kThreads < units) held[k] = from[first + k * kThreads];
#pragma unroll
  for (int k = 0; k < kCopies; ++k)
    if (first + k * kThreads < units) to[first + k * kThreads] = held[k];
}

inline int64_t pieces_of(int64_t units) {
  const int64_t each = kCopies * kThreads;
  return units > each ? (units + each - 1) / each : 1;
}

template <class Unit>
struct PushArgs {
  Unit* slots;
  int64_t* count;
  const Unit* frames;
  const int64_t* streams;
  unsigned* arrived;                             // blocks of a row that have read its counter
  int64_t S, M, T, last, units, pieces, blocks;  // last: frames written a row; blocks: of a row
};

// the last block to arrive updates the counter, after all others have read it
template <class Unit>
__global__ void __launch_bounds__(kThreads) ring_push_kernel(const __grid_constant__ PushArgs<Unit> a) {
  const int64_t row = blockIdx.x / a.blocks, k = blockIdx.x % a.blocks, stream = target(a.streams, row, a.S);
  if (stream < 0) return;
  const int64_t count = counted(a.count, stream, a.T);
  __syncthreads();
  if (a.last > 0) {
    const int64_t t = a.T - a.last + k / a.pieces, slot = (count + t) % a.M;
    copy_piece(a.frames + (row * a.T + t) * a.units, a.slots + (stream * a.M + slot) * a.units, a.units, k % a.pieces);
  }
  if (threadIdx.x > 0) return;
  // the other blocks' reads are over before the counter changes
  __threadfence();
  const bool last = atomicAdd(a.arrived + row, 1u) == a.blocks - 1;
  __threadfence();
  if (last) a.count[stream] = count + a.T;
}

template <class T>
struct ReplaceArgs {
  using A = acc_t<T>;
  T* slots;
  int64_t *count, *replaced;
  A* means;  // [S, M, D] kept from call to call, or null
  const T* frames;
  const int64_t* streams;
  A* mean;           // [rows, each, D]: of the slots unless kept, then of the frame
  A* part;           // [rows, M + 1, chunks, 2]: products and squares; the frame's own come last
  int64_t* written;  // [rows]: the counter before, negative for none
  int64_t rows, S, M, N, D, each, chunks, pieces;
};

__device__ inline float guarded(float norm) { return norm < 1e-8f ? 1e-8f : norm; }
__device__ inline double guarded(double norm) { return norm < 1e-8 ? 1e-8 : norm; }

// the same order of summation for every caller
template <class A>
__device__ A sum_of_warp(A x) {
  for (int k = kWarp / 2; k > 0; k /= 2) x += __shfl_xor_sync(~0u, x, k);
  return x;
}

template <class T, int V>
class Replace {
  using A = acc_t<T>;

 public:
  __device__ explicit Replace(const ReplaceArgs<T>& a) : a_(a) {}

  // means of the slots, where they are not kept, and of the frame: a block a slice of channels, a lane V of them
  __device__ void find_means() const {
    constexpr int64_t kSlice = kWarp * V;
    VMEMORY_SHARED(held, A[kWarps][kSlice]);
    const int64_t slices = (a_.D + kSlice - 1) / kSlice, items = a_.rows * a_.each * slices;
    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
      const int64_t d = item % slices * kSlice, m = item / slices % a_.each, row = item / slices / a_.each;
      const int64_t stream = target(a_.streams, row, a_.S);
      const bool own = m == a_.each - 1;
      if (stream < 0 || (!own && !full(stream))) continue;
      const T* from = own ? a_.frames + row * a_.N * a_.D : a_.slots + (stream * a_.M + m) * a_.N * a_.D;
      const int64_t mine = d + lane() * V;
      A sum[V] = {};
      if (mine < a_.D) {
#pragma unroll 4
        for (int64_t n = warp(); n < a_.N; n += kWarps) {
          const Pack<T, V> x = load_pack<V>(from + n * a_.D + mine);
#pragma unroll
          for (int v = 0; v < V; ++v) sum[v] += to_acc(x.x[v]);
        }
      }
      __syncthreads();
#pragma unroll
      for (int v = 0; v < V; ++v) held[warp()][lane() * V + v] = sum[v];
      __syncthreads();
      for (int64_t k = threadIdx.x; k < kSlice && d + k < a_.D; k += kThreads) {
        A total = held[0][k];
        for (int w = 1; w < kWarps; ++w) total += held[w][k];
        a_.mean[(row * a_.each + m) * a_.D + d + k] = total / static_cast<A>(a_.N);
      }
    }
  }

  // products of the compared vectors, whole frames or means, in chunks: one block per chunk of a slot
  template <bool kMean>
  __device__ void find_products() const {
    const int64_t items = a_.rows * (a_.M + 1) * a_.chunks, size = kMean ? a_.D : a_.N * a_.D;
    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
      const int64_t chunk = item % a_.chunks, m = item / a_.chunks % (a_.M + 1), row = item / a_.chunks / (a_.M + 1);
      const int64_t stream = target(a_.streams, row, a_.S), first = chunk * kChunk;
      if (threadIdx.x == 0 && chunk == 0 && m == a_.M)
        a_.written[row] = stream < 0 ? kNone : counted(a_.count, stream, 1);
      if (stream < 0 || !full(stream)) continue;
      const int64_t n = size - first < kChunk ? size - first : kChunk;
      A* out = a_.part + item * 2;
      if constexpr (kMean) {
        const A* own = a_.mean + ((row + 1) * a_.each - 1) * a_.D;
        const A* kept = a_.means ? a_.means + (stream * a_.M + m) * a_.D : a_.mean + (row * a_.each + m) * a_.D;
        multiply<1>(own + first, (m < a_.M ? kept : own) + first, n, out);
      } else {
        const T* own = a_.frames + row * size;
        multiply<V>(own + first, (m < a_.M ? a_.slots + (stream * a_.M + m) * size : own) + first, n, out);
      }
    }
  }

  // every block finds the slot of its frame again and writes a piece; counters were read before
  template <class Unit>
  __device__ void write(bool compared_means) const {
    const int64_t units = a_.N * a_.D * sizeof(T) / sizeof(Unit), items = a_.rows * a_.pieces;
    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
      const int64_t row = item / a_.pieces, piece = item % a_.pieces, before = a_.written[row];
      const bool replaces = before >= a_.M && a_.M > 0;
      const int64_t found = replaces ? most_similar(row) : kNone, slot = replaces ? found : before;
      if (piece == 0 && threadIdx.x == 0) a_.replaced[row] = found;
      if (before < 0) continue;
      const int64_t stream = target(a_.streams, row, a_.S);
      if (piece == 0 && threadIdx.x == 0) a_.count[stream] = before + 1;
      if (a_.M == 0) continue;
      copy_piece(reinterpret_cast<const Unit*>(a_.frames) + row * units,
                 reinterpret_cast<Unit*>(a_.slots) + (stream * a_.M + slot) * units, units, piece);
      if (piece > 0 || !compared_means || !a_.means) continue;
      const A* own = a_.mean + ((row + 1) * a_.each - 1) * a_.D;
      for (int64_t d = threadIdx.x; d < a_.D; d += kThreads) a_.means[(stream * a_.M + slot) * a_.D + d] = own[d];
    }
  }

 private:
  __device__ bool full(int64_t stream) const { return a_.M > 0 && a_.count[stream] >= a_.M; }

  template <int W, class X>
  __device__ void multiply(const X* x, const X* y, int64_t n, A* out) const {
    VMEMORY_SHARED(held, A[2][kWarps]);
    A ab = 0, bb = 0;
#pragma unroll 4
    for (int64_t d = threadIdx.x * W; d < n; d += kThreads * W) {
      const Pack<X, W> a = load_pack<W>(x + d), b = load_pack<W>(y + d);
#pragma unroll
      for (int v = 0; v < W; ++v) {
        ab += to_acc(a.x[v]) * to_acc(b.x[v]);
        bb += to_acc(b.x[v]) * to_acc(b.x[v]);
      }
    }
    ab = sum_of_warp(ab), bb = sum_of_warp(bb);
    __syncthreads();
    if (lane() == 0) held[0][warp()] = ab, held[1][warp()] = bb;
    __syncthreads();
    if (threadIdx.x > 1) return;
    A total = held[threadIdx.x][0];
    for (int w = 1; w < kWarps; ++w) total += held[threadIdx.x][w];
    out[threadIdx.x] = total;
  }

  // sum of a slot's products (0) or squares (1) over the chunks, by a warp
  __device__ A total(int64_t row, int64_t m, int which) const {
    const A* part = a_.part + (row * (a_.M + 1) + m) * a_.chunks * 2 + which;
    A sum = 0;
    for (int64_t c = lane(); c < a_.chunks; c += kWarp) sum += part[c * 2];
    return sum_of_warp(sum);
  }

  struct Best {
    A value;
    int64_t slot;  // negative: none

    __device__ void offer(A x, int64_t m) {
      const bool equal = x == value || (x != x && value != value);
      if (slot < 0 || beats(x, value) || (equal && m < slot)) value = x, slot = m;
    }
  };

  __device__ int64_t most_similar(int64_t row) const {
    VMEMORY_SHARED(values, A[kWarps]);
    VMEMORY_SHARED(slots, int64_t[kWarps]);
    const A own = guarded(sqrt(total(row, a_.M, 1)));
    Best best{0, kNone};
    for (int64_t m = warp(); m < a_.M; m += kWarps)
      best.offer(total(row, m, 0) / (guarded(sqrt(total(row, m, 1))) * own), m);
    __syncthreads();
    if (lane() == 0) values[warp()] = best.value, slots[warp()] = best.slot;
    __syncthreads();
    for (int w = 0; w < kWarps; ++w)
      if (slots[w] >= 0) best.offer(values[w], slots[w]);
    return best.slot;
  }

  const ReplaceArgs<T>& a_;
};

template <class T, int V, bool kMean>
__global__ void __launch_bounds__(kThreads, 2) slot_replace_kernel(const __grid_constant__ ReplaceArgs<T> a) {
  using Unit = std::conditional_t<V * sizeof(T) == sizeof(uint4), uint4, T>;
  const Replace<T, V> replace(a);
  const auto grid = cooperative_groups::this_grid();
  if constexpr (kMean) {
    replace.find_means();
    grid.sync();
  }
  replace.template find_products<kMean>();
  grid.sync();
  replace.template write<Unit>(kMean);
}

}  // namespace vmemory::ring
