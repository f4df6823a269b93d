// One frame into every stream's memory, in one launch: a block a slice of channels, the last block of a stream commits.
#pragma once

#include "bank_commit.cuh"

namespace vmemory::bank {

template <class T>
struct PushArgs {
  using A = acc_t<T>;
  Geometry g;
  MapOffsets maps;
  AxisTable axes;  // rows and columns of each step down, then of each way in
  T* slots;
  float* mass;
  A *descriptor, *norm, *link;
  int64_t* entry;
  double* clock;
  int64_t *order, *counter;
  const T* frames;
  const double* time;      // null = NaN
  const bool* valid;       // null = every cell
  const int64_t* streams;  // null = row i goes to stream i
  const int64_t* victim;   // [S, T, tiers], null = the rule chooses
  const A* table;
  A* partial;         // [S, items, slices of K], each written before it is read
  unsigned* arrived;  // [S] zero before and after every launch
  int64_t slices, key_slices, items, state_streams, frame, frames_per_stream;
};

__host__ __device__ inline int step_axis(int tier) { return 2 * tier; }
__host__ __device__ inline int entry_axis(const Geometry& g, int tier) { return 2 * (g.tiers - 1 + tier); }

// links that may change, then squared norms: of the new frame's descriptors and of a merged one
__host__ __device__ inline int64_t push_items(const Geometry& g) { return pair_items(g) + g.R + g.rule.merge; }

// dynamic shared memory of a block, in this order
template <class A>
struct PushShared {
  Work<A>* work;
  A *tile, *share;
  int2* spans;

  __host__ __device__ PushShared(unsigned char* bytes, const Geometry& g)
      : work(reinterpret_cast<Work<A>*>(bytes)),
        tile(reinterpret_cast<A*>(bytes + (sizeof(Work<A>) + 15) / 16 * 16)),
        share(tile + kTile<A> * kSlice),
        spans(reinterpret_cast<int2*>(share + (g.R > 1 ? (g.R * (g.H + g.W) + 1) / 2 * 2 : 0))) {}
  static size_t bytes(const Geometry& g, const AxisTable& axes) {
    unsigned char* base = nullptr;
    return reinterpret_cast<unsigned char*>(PushShared(base, g).spans + axes.spans) - base;
  }
};

// sums the blocks' parts over slices of K, in an order that does not depend on the launch
template <class A>
struct PartialDots {
  const A* partial;
  int64_t key_slices, pairs;
  int R;

  __device__ A total(int64_t item) const {
    const A* from = partial + item * key_slices;
    A sum = 0;
    for (int64_t k = lane_of(); k < key_slices; k += kWarp) sum += from[k];
    return warp_sum(sum);
  }
  __device__ A square(int r, bool merged) const { return total(pairs + (merged ? R : r)); }
  __device__ A product(int64_t item, const Pair&) const { return total(item); }
};

// the block's slice of every token and descriptor, deepest tier first
template <int V, class T>
__device__ void move_slice(const PushArgs<T>& a, const Stream<acc_t<T>>& s, const PushShared<acc_t<T>>& shared,
                           T* slots, const float* mass, const T* frame, const bool* valid, int64_t d0) {
  using A = acc_t<T>;
  const Geometry& g = a.g;
  const Step& step = shared.work->step;
  const int r = warp_of();
  const int64_t channel = d0 + lane_of(), RK = g.R * g.K;
  A* column = r < g.R && channel < g.K ? s.descriptor + r * g.K + channel : nullptr;
  for (int i = step.length - 1; i >= 0; --i) {
    const int tier = step.first + i;
    const int64_t slot = step.slot[i], target = step.target[i], row = g.row_of(slot);
    if (step.merged >= 0) {
      const int64_t to = g.row_of(step.merged);
      merge_slice<V>(slots + to * g.D, slots + row * g.D, mass + to, mass + row, g.cells(tier), g.D, d0);
      if (column) {
        const double x = s.clock[step.merged * 4 + kMass], y = s.clock[slot * 4 + kMass];
        const A share = x + y > 0 ? static_cast<A>(x / (x + y)) : A(0.5);
        column[step.merged * RK] = fma(share, column[step.merged * RK], (A(1) - share) * column[slot * RK]);
      }
    } else if (target >= 0) {
      pool_slice<V>(slots + row * g.D, mass + row, nullptr, axis_of(a.axes, step_axis(tier), a.table, shared.spans),
                    axis_of(a.axes, step_axis(tier) + 1, a.table, shared.spans), slots + g.row_of(target) * g.D, g.D,
                    d0);
      // a descriptor's channel belongs to one thread at every level
      if (column) column[target * RK] = column[slot * RK];
    }
    __syncthreads();
  }
  T* fresh = slots + g.row_of(step.fresh) * g.D;
  const bool whole = g.height[step.first] == g.H && g.width[step.first] == g.W && !valid;
  const Describe<A> describe{shared.share, valid, shared.tile, s.descriptor + step.fresh * RK, step.first};
  read_slice<V>(g, frame, whole ? fresh : nullptr, describe, d0);
  if (whole) return;
  const int axis = entry_axis(g, step.first);
  pool_slice<V>(frame, nullptr, valid, axis_of(a.axes, axis, a.table, shared.spans),
                axis_of(a.axes, axis + 1, a.table, shared.spans), fresh, g.D, d0);
}

// this slice's part of every product the commit needs
template <class T>
__device__ void sum_products(const PushArgs<T>& a, const Stream<acc_t<T>>& s, const Work<acc_t<T>>& work,
                             acc_t<T>* partial, int64_t slice) {
  using A = acc_t<T>;
  const Geometry& g = a.g;
  const int64_t pairs = pair_items(g), channel = slice * kSlice + lane_of();
  for (int64_t item = warp_of(); item < a.items; item += kThreads / kWarp) {
    int64_t x, y, r;
    if (item < pairs) {
      const Pair pair = pair_of(g, s, work, item);
      if (pair.link < 0) continue;
      x = pair.a, y = pair.b, r = g.descriptor_of(pair.tier);
    } else {
      r = item - pairs < g.R ? item - pairs : 0;
      x = y = item - pairs < g.R ? work.step.fresh : work.step.merged;
      if (x < 0) continue;
    }
    A product = 0;
    if (channel < g.K)
      product = times(s.descriptor[(x * g.R + r) * g.K + channel], s.descriptor[(y * g.R + r) * g.K + channel]);
    product = warp_sum(product);
    if (lane_of() == 0) partial[item * a.key_slices + slice] = product;
  }
}

// cells that each token stands for: the last block, level by level
template <class T>
__device__ void move_mass(const PushArgs<T>& a, const PushShared<acc_t<T>>& shared, float* mass, const bool* valid) {
  using A = acc_t<T>;
  const Geometry& g = a.g;
  const Step& step = shared.work->step;
  const auto pool = [&](const float* from, const bool* cells_valid, int axis, float* to) {
    const Axis<A> rows = axis_of(a.axes, axis, a.table, shared.spans);
    const Axis<A> columns = axis_of(a.axes, axis + 1, a.table, shared.spans);
    const int cells = rows.m * columns.m;
    const A ratio = static_cast<A>(rows.n * columns.n) / static_cast<A>(cells);
    for (int c = threadIdx.x; c < cells; c += kThreads)
      to[c] =
          static_cast<float>(Window<A>{rows, columns, c / columns.m, c % columns.m, from, cells_valid}.held() * ratio);
  };
  for (int i = step.length - 1; i >= 0; --i) {
    const int tier = step.first + i;
    const float* from = mass + g.row_of(step.slot[i]);
    if (step.merged >= 0) {
      float* to = mass + g.row_of(step.merged);
      for (int64_t c = threadIdx.x; c < g.cells(tier); c += kThreads) to[c] += from[c];
    } else if (step.target[i] >= 0) {
      pool(from, nullptr, step_axis(tier), mass + g.row_of(step.target[i]));
    }
    __syncthreads();
  }
  float* fresh = mass + g.row_of(step.fresh);
  const int64_t cells = g.cells(step.first);
  if (valid) {
    pool(nullptr, valid, entry_axis(g, step.first), fresh);
  } else {
    const float each = static_cast<float>(g.H * g.W) / static_cast<float>(cells);
    for (int64_t c = threadIdx.x; c < cells; c += kThreads) fresh[c] = each;
  }
}

// by one warp
__device__ inline int64_t count_valid(const Geometry& g, const bool* valid) {
  if (!valid) return g.H * g.W;
  int count = 0;
  for (int64_t c = lane_of(); c < g.H * g.W; c += kWarp) count += valid[c];
  return warp_sum(count);
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads, 2) push_kernel(const __grid_constant__ PushArgs<T> a) {
  using A = acc_t<T>;
  unsigned char* const bank_shared = dynamic_shared<unsigned char>();
  const Geometry& g = a.g;
  const PushShared<A> shared(bank_shared, g);
  Work<A>& work = *shared.work;
  const int64_t row = blockIdx.x / a.slices, slice = blockIdx.x % a.slices, d0 = slice * kSlice;
  const int64_t at = a.streams ? a.streams[row] : row;
  if (at < 0 || at >= a.state_streams) return;
  const Stream<A> s{a.descriptor + at * g.M * g.R * g.K,
                    a.norm + at * g.M * g.R,
                    a.link + at * g.P,
                    a.entry + at * g.M * 4,
                    a.clock + at * g.M * 4,
                    a.order + at * g.M,
                    a.counter + at * (kLength + g.tiers)};
  const int64_t f = row * a.frames_per_stream + a.frame, cells = g.H * g.W;
  const bool* valid = a.valid ? a.valid + f * cells : nullptr;
  float* mass = a.mass + at * g.L;
  A* partial = a.partial + row * a.items * a.key_slices;

  find_spans(a.axes, a.table, shared.spans);
  decide_by_block(g, s, a.victim ? a.victim + f * g.tiers : nullptr, work);
  if (work.step.first >= 0) {
    if (g.R > 1) {
      find_shares(g, a.maps, a.table, work.step.first, shared.share);
      __syncthreads();
    }
    move_slice<V>(a, s, shared, a.slots + at * g.L * g.D, mass, a.frames + f * cells * g.D, valid, d0);
    __syncthreads();
    if (d0 < g.K) sum_products(a, s, work, partial, slice);
  }

  // release the block's writes, then acquire those of the others if this block is the last
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    work.last = atomicAdd(a.arrived + row, 1u) == a.slices - 1;
    __threadfence();
  }
  __syncthreads();
  if (!work.last) return;
  if (threadIdx.x == 0) a.arrived[row] = 0;
  if (warp_of() == 0) {
    const int64_t count = count_valid(g, valid);
    if (lane_of() == 0) work.cells = count;
  }
  if (work.step.first >= 0) move_mass(a, shared, mass, valid);
  __syncthreads();
  const PartialDots<A> dots{partial, a.key_slices, pair_items(g), static_cast<int>(g.R)};
  commit_by_block(g, s, work, dots, a.time ? a.time[f] : static_cast<double>(NAN), static_cast<double>(work.cells));
}

template <class A>
struct DecideArgs {
  Geometry g;
  const A *norm, *link;
  const int64_t *entry, *order, *counter;
  const int64_t* streams;  // null = row i is stream i
  const int64_t* victim;   // [S, tiers], null = the rule chooses
  int64_t* out;            // [S, 3 + 2 tiers]
  int64_t state_streams;
};

// decides the next frame of a stream, by a block
template <class A>
__global__ void __launch_bounds__(kThreads, 2) decide_kernel(const __grid_constant__ DecideArgs<A> a) {
  Work<A>& work = *dynamic_shared<Work<A>>();
  const Geometry& g = a.g;
  const int64_t row = blockIdx.x, at = a.streams ? a.streams[row] : row;
  int64_t* out = a.out + row * (kStepHead + 2 * g.tiers);
  if (at < 0 || at >= a.state_streams) {
    if (threadIdx.x == 0) write_step(g, Step(), out);
    return;
  }
  // decide_by_block() only reads
  const Stream<A> s{nullptr,
                    const_cast<A*>(a.norm) + at * g.M * g.R,
                    const_cast<A*>(a.link) + at * g.P,
                    const_cast<int64_t*>(a.entry) + at * g.M * 4,
                    nullptr,
                    const_cast<int64_t*>(a.order) + at * g.M,
                    const_cast<int64_t*>(a.counter) + at * (kLength + g.tiers)};
  decide_by_block(g, s, a.victim ? a.victim + row * g.tiers : nullptr, work);
  if (threadIdx.x == 0) write_step(g, work.step, out);
}

}  // namespace vmemory::bank
