// The update of a stream's lists by a block after its tokens moved: the host's apply(), norms and links. Torch-free.
#pragma once

#include "bank_step.cuh"

namespace vmemory::bank {

// a tier's new list, by a warp: only the places between the removal and the insertion move
template <class A>
__device__ void relist_by_warp(const Geometry& g, const Stream<A>& s, const Change& c, int tier) {
  int64_t* order = s.order + g.slot0[tier];
  A* link = s.link + g.link0[tier];
  const bool linked = g.rule.choose == Rule::kAdjacent;
  const int64_t kept = c.before - (c.removed >= 0), n = kept + (c.inserted >= 0);
  const int64_t from = c.removed >= 0 ? c.removed : c.before, to = c.inserted >= 0 ? c.inserted : kept;
  const int64_t low = from < to ? from : to, count = from < to ? to - from : from - to;
  for (int64_t base = 0; base < count; base += kWarp) {
    const int64_t k = base + lane_of();
    // in the direction of the move, so that nothing is read after it was overwritten
    const int64_t write = from < to ? low + k : from - k, read = from < to ? write + 1 : write - 1;
    int64_t slot = -1;
    A cosine = 0;
    if (k < count) {
      slot = order[read];
      if (linked) cosine = link[read];
    }
    __syncwarp();
    if (k < count) {
      order[write] = slot;
      if (linked) link[write] = cosine;
    }
  }
  if (lane_of() == 0) {
    if (c.inserted >= 0) order[c.inserted] = c.slot;
    if (n < c.before) order[n] = -1;
  }
}

// apply() by a block, with norms and links; readers must synchronise the block first. dots.square(r, merged) is
// the squared norm of the fresh or the merged slot's descriptor, dots.product(item, pair) the product of a pair's; both
// by a warp.
template <class A, class Dots>
__device__ void commit_by_block(const Geometry& g, const Stream<A>& s, Work<A>& work, const Dots& dots, double time,
                                double mass) {
  const Step& step = work.step;
  const int thread = threadIdx.x, warp = warp_of(), warps = blockDim.x / kWarp;
  const bool merges = step.merged >= 0;
  if (step.first < 0) {
    if (thread == 0) s.counter[kSeen] = work.counter[kSeen] + 1, s.counter[kSkipped] = work.counter[kSkipped] + 1;
    return;
  }
  // read everything that moves, then write it
  const int level = thread / 4, column = thread % 4;
  const bool moves = level < step.length && !merges && step.target[level] >= 0;
  int64_t entry = 0;
  double clock = 0;
  if (moves) entry = s.entry[step.slot[level] * 4 + column], clock = s.clock[step.slot[level] * 4 + column];
  const int R = static_cast<int>(g.R), norm_level = thread / R, norm_r = thread % R;
  const bool norm_moves = norm_level < step.length && !merges && step.target[norm_level] >= 0;
  const A norm = norm_moves ? s.norm[step.slot[norm_level] * R + norm_r] : A(0);
  const bool squares = warp < (merges ? R + 1 : R);
  const A square = squares ? dots.square(warp < R ? warp : 0, warp >= R) : A(0);
  __syncthreads();
  if (moves) s.entry[step.target[level] * 4 + column] = entry, s.clock[step.target[level] * 4 + column] = clock;
  if (norm_moves) s.norm[step.target[norm_level] * R + norm_r] = norm;
  if (squares && lane_of() == 0) s.norm[warp < R ? step.fresh * R + warp : step.merged] = sqrt(square);
  if (thread == 0) {
    if (merges) {
      int64_t* a = s.entry + step.merged * 4;
      double* ca = s.clock + step.merged * 4;
      const int64_t* b = s.entry + step.slot[0] * 4;
      const double* cb = s.clock + step.slot[0] * 4;
      const double na = static_cast<double>(a[kFrames]), nb = static_cast<double>(b[kFrames]);
      ca[kTime] = (times(ca[kTime], na) + times(cb[kTime], nb)) / (na + nb);
      ca[kStop] = cb[kStop];
      ca[kMass] += cb[kMass];
      a[kLast] = b[kLast];
      a[kFrames] += b[kFrames];
    }
    const int64_t frame = work.counter[kSeen];
    int64_t* fresh = s.entry + step.fresh * 4;
    double* times = s.clock + step.fresh * 4;
    fresh[kFrame] = fresh[kFirst] = fresh[kLast] = frame;
    fresh[kFrames] = 1;
    times[kTime] = times[kStart] = times[kStop] = time;
    times[kMass] = mass;
    s.counter[kSeen] = frame + 1;
    const bool drops = step.length > 0 && !merges && step.target[step.length - 1] < 0;
    s.counter[kDropped] = work.counter[kDropped] + drops;
  }
  if (thread < g.tiers) {
    const Change& c = work.change[thread];
    s.counter[kLength + thread] = c.before - (c.removed >= 0) + (c.inserted >= 0);
  }
  __syncthreads();
  const int64_t items = pair_items(g);
  const bool square_links = g.rule.choose == Rule::kAll;
  for (int64_t item = warp; item < items; item += warps) {
    const Pair pair = pair_of(g, s, work, item);
    if (pair.link < 0) continue;
    const int64_t r = g.descriptor_of(pair.tier);
    const A na = s.norm[pair.a * R + r], nb = s.norm[pair.b * R + r], eps = A(1e-8);
    const A cosine = dots.product(item, pair) / ((na < eps ? eps : na) * (nb < eps ? eps : nb));
    if (lane_of() > 0) continue;
    if (square_links) {
      s.link[pair.link] = s.link[pair.mirror] = cosine;
    } else {
      work.cosine[item] = cosine;
    }
  }
  if (items > 0) __syncthreads();
  if (warp < g.tiers) relist_by_warp(g, s, work.change[warp], warp);
  if (square_links || items == 0) return;
  __syncthreads();
  if (thread < items) {
    const int tier = thread / kLinksPerTier;
    const int64_t place = place_of(work.change[tier], step, thread % kLinksPerTier);
    if (place > 0) s.link[g.link0[tier] + place] = work.cosine[thread];
  }
}

}  // namespace vmemory::bank
