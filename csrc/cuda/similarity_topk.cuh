// Exact search on the device. The best k rows lie in the k groups of neighbouring rows whose best rows are best: one
// kernel reads the memory and keeps the best of every group, a second chooses groups, scores them again and sorts.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/vec.h"
#include "cuda/language.cuh"

namespace vmemory::search {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr int kRows = 4;  // rows of a warp at a time: each piece of a query is fetched once for all of them
constexpr int kFinishThreads = 512;
constexpr int kFinishWarps = kFinishThreads / kWarp;
constexpr int kHeld = 2048;  // keys a block holds before it drops all but the best k
constexpr int kMaxK = 1024;
constexpr unsigned kAll = ~0u;

using Key = long long;
constexpr Key kNothing = INT64_MIN;
constexpr int kLow = INT32_MAX;

// Integers in the order of the scores: NaN above all, of equal scores the lower slot, all above kNothing. They all
// differ, so that the best k are the same set in whatever order they are found.
__device__ inline Key key_of(float score, int64_t slot) {
  int bits = __float_as_int(score == 0.f ? 0.f : score);
  bits = score != score ? kLow : bits < 0 ? bits ^ kLow : bits;
  return static_cast<Key>(bits) << 32 | static_cast<unsigned>(static_cast<int>(slot) ^ kLow);
}
__device__ inline float score_of(Key key) {
  const int bits = static_cast<int>(key >> 32);
  return __int_as_float(bits < 0 ? bits ^ kLow : bits);
}
__device__ inline int64_t slot_of(Key key) { return static_cast<int>(key) ^ kLow; }

struct Args {
  const void *query, *memory;  // [S, Q, D] of the query's dtype, [S, M, D]
  const int64_t* count;        // [S] or null
  const bool* where;           // [S, M] or null
  const float* scale;          // [S, M] or null
  Key* best;                   // [S, Q, groups]
  float* value;                // [S, Q, k]
  int64_t* index;              // [S, Q, k]
  int64_t Q, M, D, padded, groups;
  int k, group;
  bool cosine;
};

__device__ inline float widen_one(float x) { return x; }
__device__ inline float widen_one(int8_t x) { return static_cast<float>(x); }
__device__ inline float widen_one(f16 x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ inline float widen_one(bf16 x) { return __bfloat162float(__ushort_as_bfloat16(x.bits)); }

// channels of a row that one lane holds at a time: 16 bytes
template <class T>
constexpr int kPiece = 16 / sizeof(T);

template <class T>
__host__ __device__ constexpr int64_t padded_channels(int64_t D) {
  constexpr int64_t step = kWarp * kPiece<T>;
  return (D + step - 1) / step * step;
}

// where channel d of a query lies in shared memory: lanes side by side, 16 bytes each, as they read it
template <class T>
__device__ inline int place_of(int d) {
  constexpr int V = kPiece<T>;
  const int in_step = d % (kWarp * V), lane = in_step / V, part = in_step % V / 4;
  return d - in_step + part * (kWarp * 4) + lane * 4 + d % 4;
}

template <class T, bool kAligned>
__device__ inline void load_piece(const T* row, int64_t d, int64_t D, float* out) {
  constexpr int V = kPiece<T>;
  if constexpr (kAligned) {
    uint4 raw = make_uint4(0, 0, 0, 0);
    if (d < D) raw = __ldg(reinterpret_cast<const uint4*>(row + d));
    T from[V];
    memcpy(from, &raw, sizeof raw);
#pragma unroll
    for (int i = 0; i < V; ++i) out[i] = widen_one(from[i]);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) out[i] = d + i < D ? widen_one(row[d + i]) : 0.f;
  }
}

// Sums over the lanes of N values each, in one order of the lanes whatever N is. Afterwards lane l holds max(1, N / 32)
// of the sums: its bits, the highest first, choose the upper or lower half of what is left.
template <int N, int kMask = kWarp / 2>
__device__ inline void sum_lanes(float* x) {
  if constexpr (kMask > 0) {
    const int lane = threadIdx.x % kWarp;
    if constexpr (N > 1) {
      const bool upper = lane & kMask;
#pragma unroll
      for (int i = 0; i < N / 2; ++i) {
        const float keep = upper ? x[i + N / 2] : x[i], send = upper ? x[i] : x[i + N / 2];
        x[i] = __fadd_rn(keep, __shfl_xor_sync(kAll, send, kMask));
      }
    } else {
      x[0] = __fadd_rn(x[0], __shfl_xor_sync(kAll, x[0], kMask));
    }
    sum_lanes<(N > 1 ? N / 2 : 1), kMask / 2>(x);
  }
}

__device__ inline float norm_of(float square, float scale = 1.f) {
  const float norm = __fmul_rn(__fsqrt_rn(square), fabsf(scale));
  return norm < 1e-8f ? 1e-8f : norm;
}

// queries [first, first + kQueries) in float32 to shared memory, those that do not exist as zeros
template <class U, class T, int kQueries, int kBlock>
__device__ inline void load_queries(const Args& a, int64_t stream, int64_t first, float* to) {
  const U* from = static_cast<const U*>(a.query) + (stream * a.Q + first) * a.D;
  for (int q = 0; q < kQueries; ++q)
    for (int d = threadIdx.x; d < a.padded; d += kBlock)
      to[q * a.padded + place_of<T>(d)] = first + q < a.Q && d < a.D ? widen_one(from[q * a.D + d]) : 0.f;
}

// the norm of a query in shared memory, by one warp
template <class T>
__device__ inline float query_norm(const Args& a, const float* query) {
  float square = 0.f;
  for (int d = threadIdx.x % kWarp; d < a.padded; d += kWarp) square = __fmaf_rn(query[d], query[d], square);
  sum_lanes<1>(&square);
  return norm_of(square);
}

// Keys of four rows from `first` for kQueries queries, by one warp. Lane l gets those of row first + l / 8, which
// `searched` speaks of, and of the query (l % 8) * kQueries / 8 and those after it.
template <class T, int kQueries, bool kAligned>
__device__ inline void score_rows(const Args& a, int64_t stream, int64_t first, bool searched, const float* queries,
                                  const float* norms, Key* key) {
  constexpr int V = kPiece<T>, kSums = kRows * kQueries, kMine = kSums > kWarp ? kSums / kWarp : 1;
  const int lane = threadIdx.x % kWarp;
  const unsigned active = __ballot_sync(kAll, searched);
  float dot[kSums], square[kRows];
#pragma unroll
  for (int i = 0; i < kSums; ++i) dot[i] = 0.f;
#pragma unroll
  for (int r = 0; r < kRows; ++r) square[r] = 0.f;
  const T* rows = static_cast<const T*>(a.memory) + (stream * a.M + first) * a.D;
  for (int64_t step = 0; step < a.D; step += kWarp * V) {
    float x[kRows][V];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      load_piece<T, kAligned>(rows + r * a.D, step + lane * V, active >> 8 * r & 1 ? a.D : 0, x[r]);
    if (a.cosine)
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int i = 0; i < V; ++i) square[r] = __fmaf_rn(x[r][i], x[r][i], square[r]);
#pragma unroll
    for (int q = 0; q < kQueries; ++q) {
#pragma unroll
      for (int part = 0; part < V / 4; ++part) {
        const float4 w = *reinterpret_cast<const float4*>(queries + q * a.padded + step + part * kWarp * 4 + lane * 4);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          float& sum = dot[r * kQueries + q];
          sum = __fmaf_rn(x[r][part * 4], w.x, sum);
          sum = __fmaf_rn(x[r][part * 4 + 1], w.y, sum);
          sum = __fmaf_rn(x[r][part * 4 + 2], w.z, sum);
          sum = __fmaf_rn(x[r][part * 4 + 3], w.w, sum);
        }
      }
    }
  }
  sum_lanes<kSums>(dot);
  const int64_t row = first + lane / 8;
  const float scale = a.scale && searched ? a.scale[stream * a.M + row] : 1.f;
  float norm = 1.f;
  if (a.cosine) {
    sum_lanes<kRows>(square);
    norm = norm_of(square[0], scale);
  }
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    float score = __fmul_rn(dot[i], scale);
    if (a.cosine) {
      const int q = lane % 8 * kQueries / 8 + i;
      score = __fdiv_rn(score, __fmul_rn(norm, norms[q]));
    }
    key[i] = searched ? key_of(score, row) : kNothing;
  }
}

__device__ inline int64_t slots_of(const Args& a, int64_t stream) {
  if (!a.count) return a.M;
  const int64_t n = a.count[stream];
  return n < a.M ? n : a.M;
}

__device__ inline bool is_searched(const Args& a, int64_t stream, int64_t row, int64_t n) {
  return row < n && (!a.where || a.where[stream * a.M + row]);
}

// best[s, q, g] for kQueries queries of a stream; grid (blocks, streams, chunks of queries)
template <class U, class T, int kQueries, bool kAligned>
__global__ void __launch_bounds__(kThreads, 1) groups_kernel(Args a) {
  float* const queries = dynamic_shared<float>();
  VMEMORY_SHARED(norms, float[kQueries]);
  constexpr int kMine = kRows * kQueries > kWarp ? kRows * kQueries / kWarp : 1;
  const int64_t stream = blockIdx.y, chunk = static_cast<int64_t>(blockIdx.z) * kQueries;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  load_queries<U, T, kQueries, kThreads>(a, stream, chunk, queries);
  __syncthreads();
  for (int q = warp; q < kQueries; q += kWarps) {
    const float norm = query_norm<T>(a, queries + q * a.padded);
    if (lane == 0) norms[q] = norm;
  }
  __syncthreads();
  const int64_t n = slots_of(a, stream), step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t g = static_cast<int64_t>(blockIdx.x) * kWarps + warp; g < a.groups; g += step) {
    Key best[kMine];
#pragma unroll
    for (int i = 0; i < kMine; ++i) best[i] = kNothing;
    const int64_t begin = g * a.group, end = begin + a.group < n ? begin + a.group : n;
    for (int64_t first = begin; first < end; first += kRows) {
      Key key[kMine];
      score_rows<T, kQueries, kAligned>(a, stream, first, is_searched(a, stream, first + lane / 8, n), queries, norms,
                                        key);
#pragma unroll
      for (int i = 0; i < kMine; ++i) best[i] = max(best[i], key[i]);
    }
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      best[i] = max(best[i], __shfl_xor_sync(kAll, best[i], 16));
      best[i] = max(best[i], __shfl_xor_sync(kAll, best[i], 8));
      const int64_t q = chunk + lane % 8 * kQueries / 8 + i;
      // lanes that hold the same sum agree, the first of them writes
      const bool first = lane < 8 && (kQueries >= 8 || lane % (8 / (kQueries < 8 ? kQueries : 8)) == 0);
      if (first && q < a.Q) a.best[(stream * a.Q + q) * a.groups + g] = best[i];
    }
  }
}

// The best k of any number of keys, in shared memory. All threads of the block call every member together.
class Best {
 public:
  __device__ Best(Key* keys, int* held, int k) : keys_(keys), shared_held_(held), k_(k) { clear(); }

  __device__ void clear() {
    __syncthreads();
    if (threadIdx.x == 0) *shared_held_ = 0;
    held_ = 0;
    least_ = kNothing;
    __syncthreads();
  }

  __device__ void add(Key key) {
    const bool passes = key > least_;
    if (passes) keys_[atomicAdd(shared_held_, 1)] = key;
    // also the barrier after which the keys may be read
    held_ += __syncthreads_count(passes);
    if (held_ + kFinishThreads > kHeld) sort();
  }

  // the best first; how many there are
  __device__ int finish() {
    sort();
    return held_;
  }

 private:
  __device__ void sort() {
    int size = kWarp;
    while (size < held_) size *= 2;
    for (int i = held_ + threadIdx.x; i < size; i += kFinishThreads) keys_[i] = kNothing;
    __syncthreads();
    for (int run = 2; run <= size; run *= 2)
      for (int apart = run / 2; apart > 0; apart /= 2) {
        for (int pair = threadIdx.x; pair < size / 2; pair += kFinishThreads) {
          const int i = pair / apart * 2 * apart + pair % apart, j = i + apart;
          const Key x = keys_[i], y = keys_[j];
          if ((x < y) == ((i & run) == 0)) keys_[i] = y, keys_[j] = x;
        }
        __syncthreads();
      }
    held_ = held_ < k_ ? held_ : k_;
    least_ = k_ > 0 && held_ == k_ ? keys_[k_ - 1] : kNothing;
    if (threadIdx.x == 0) *shared_held_ = held_;
    __syncthreads();
  }

  Key* keys_;
  int* shared_held_;
  int k_, held_;
  Key least_;
};

// the result of one query; grid (queries, streams)
template <class U, class T, bool kAligned>
__global__ void __launch_bounds__(kFinishThreads, 1) finish_kernel(Args a) {
  float* const query = dynamic_shared<float>();
  VMEMORY_SHARED(keys, Key[kHeld]);
  VMEMORY_SHARED(chosen, int[kMaxK]);
  VMEMORY_SHARED(held, int);
  VMEMORY_SHARED(norm, float);
  const int64_t q = blockIdx.x, stream = blockIdx.y, place = stream * a.Q + q;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  load_queries<U, T, 1, kFinishThreads>(a, stream, q, query);
  __syncthreads();
  if (warp == 0) {
    const float found = query_norm<T>(a, query);
    if (lane == 0) norm = found;
  }
  Best best(keys, &held, a.k);
  for (int64_t first = 0; first < a.groups; first += kFinishThreads) {
    const int64_t g = first + threadIdx.x;
    best.add(g < a.groups ? a.best[place * a.groups + g] : kNothing);
  }
  const int groups = best.finish();
  for (int i = threadIdx.x; i < groups; i += kFinishThreads) chosen[i] = static_cast<int>(slot_of(keys[i]) / a.group);
  best.clear();
  const int64_t n = slots_of(a, stream);
  const int quads = a.group / kRows, work = groups * quads;
  for (int first = 0; first < work; first += kFinishWarps) {
    Key key = kNothing;
    if (first + warp < work) {
      const int item = first + warp;
      const int64_t row = static_cast<int64_t>(chosen[item / quads]) * a.group + item % quads * kRows;
      score_rows<T, 1, kAligned>(a, stream, row, is_searched(a, stream, row + lane / 8, n), query, &norm, &key);
    }
    best.add(lane % 8 == 0 ? key : kNothing);
  }
  const int found = best.finish();
  for (int i = threadIdx.x; i < a.k; i += kFinishThreads) {
    a.value[place * a.k + i] = i < found ? score_of(keys[i]) : __int_as_float(0xff800000);
    a.index[place * a.k + i] = i < found ? slot_of(keys[i]) : -1;
  }
}

}  // namespace vmemory::search
