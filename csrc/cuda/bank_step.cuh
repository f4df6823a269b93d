// The decision for one frame of a stream by a block: the host's decide() with a warp for each tier. Torch-free.
#pragma once

#include "bank_tokens.cuh"

namespace vmemory::bank {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kLinksPerTier = 4;

// the change of one tier's list in a step
struct Change {
  int64_t before;    // entries before it
  int64_t removed;   // list place that is given up, -1 = none
  int64_t inserted;  // place of `slot` in the new list, -1 = none
  int64_t slot;
};

// a link to be computed anew: slots a and b of a tier, next to each other in the new list under adjacent rules
struct Pair {
  int64_t a, b;
  int64_t link;    // place in link[P], -1 = the item does not exist
  int64_t mirror;  // the same pair the other way round, or link
  int tier;
};

// shared data of a block's threads about one step
template <class A>
struct Work {
  int64_t counter[kLength + kMaxTiers];
  Leaving leaving[kMaxTiers];
  Change change[kMaxTiers];
  Step step;
  A cosine[kMaxTiers * kLinksPerTier];
  int64_t cells;  // valid cells of the frame
  int last;
};

__device__ inline int warp_of() { return threadIdx.x / kWarp; }
__device__ inline int lane_of() { return threadIdx.x % kWarp; }

// a fixed tree of additions, with the same result in every lane
template <class A>
__device__ A warp_sum(A x) {
  for (int k = kWarp / 2; k > 0; k /= 2) x += __shfl_xor_sync(kAllLanes, x, k);
  return x;
}

// A product that is not contracted with a sum: a compiler may contract either product, which would change decisions.
__device__ inline float times(float x, float y) { return __fmul_rn(x, y); }
__device__ inline double times(double x, double y) { return __dmul_rn(x, y); }

// the larger value with its index; of equals the lower index; NaN is the largest
template <class A>
__device__ void warp_argmax(A* value, int64_t* index) {
  for (int k = kWarp / 2; k > 0; k /= 2) {
    const A other = __shfl_xor_sync(kAllLanes, *value, k);
    const int64_t at = __shfl_xor_sync(kAllLanes, *index, k);
    if (exceeds(other, *value) || (!exceeds(*value, other) && at < *index)) *value = other, *index = at;
  }
}

// choose() by a warp; `wanted` is the slot that a caller chose, as in decide()
template <class A>
__device__ Leaving choose_by_warp(const Geometry& g, const Stream<A>& s, int tier, int64_t frame, int64_t n,
                                  int64_t wanted) {
  const int64_t none = INT64_MAX;
  if (wanted >= 0) {
    int64_t found = -1, unused = 0;
    for (int64_t p = lane_of(); p < n; p += kWarp)
      if (listed(g, s, tier, p) == wanted) found = p;
    warp_argmax(&found, &unused);
    if (found >= 0) return named(g, s, tier, found);
  }
  if (n == 1 || g.rule.choose == Rule::kOldest) return {0, listed(g, s, tier, 0), -1};
  if (g.rule.choose == Rule::kGap) {
    int64_t widest = INT64_MIN, place = none;
    const auto frame_at = [&](int64_t p) { return s.entry[listed(g, s, tier, p) * 4 + kFrame]; };
    for (int64_t p = 1 + lane_of(); p < n; p += kWarp) {
      const int64_t narrow = frames_between(p + 1 < n ? frame_at(p + 1) : frame, frame_at(p - 1));
      if (place == none || narrow > widest) widest = narrow, place = p;
    }
    warp_argmax(&widest, &place);
    return {place, listed(g, s, tier, place), -1};
  }
  const A* link = s.link + g.link0[tier];
  A best = -INFINITY;
  int64_t found = none, older, newer;
  if (g.rule.choose == Rule::kAll) {
    const int64_t c = g.capacity[tier];
    for (int64_t k = lane_of(); k < n * n; k += kWarp) {
      const int64_t i = k / n, j = k % n;
      if (i >= j) continue;
      const A x = link[(listed(g, s, tier, i) - g.slot0[tier]) * c + listed(g, s, tier, j) - g.slot0[tier]];
      if (found == none || exceeds(x, best)) best = x, found = k;
    }
    warp_argmax(&best, &found);
    older = found / n, newer = found % n;
  } else {
    for (int64_t p = 1 + lane_of(); p < n; p += kWarp) {
      const A x = link[p];
      if (found == none || exceeds(x, best)) best = x, found = p;
    }
    warp_argmax(&best, &found);
    older = found - 1, newer = found;
  }
  return leaver(g, s, tier, older, newer, best);
}

// slot at place k of a tier's list without the place that is given up
template <class A>
__device__ int64_t kept_slot(const Geometry& g, const Stream<A>& s, const Change& c, int tier, int64_t k) {
  return listed(g, s, tier, c.removed >= 0 && k >= c.removed ? k + 1 : k);
}

// the change of a tier by the step, by a warp
template <class A>
__device__ Change change_by_warp(const Geometry& g, const Stream<A>& s, const Step& step, int tier, int64_t n) {
  Change c{n, -1, -1, -1};
  const int i = tier - step.first;
  if (step.first < 0 || i < 0 || i > step.length) return c;
  if (i < step.length) c.removed = step.place[i];
  const int64_t kept = n - (c.removed >= 0);
  if (i == 0) {
    // the newest of all
    c.slot = step.fresh;
    c.inserted = kept;
    return c;
  }
  if (step.merged >= 0 || step.target[i - 1] < 0) return c;
  c.slot = step.target[i - 1];
  c.inserted = kept;
  if (!g.rule.by_time) return c;
  const int64_t frame = s.entry[step.slot[i - 1] * 4 + kFrame];
  int64_t place = 0;
  for (int64_t k = lane_of(); k < kept; k += kWarp)
    if (s.entry[kept_slot(g, s, c, tier, k) * 4 + kFrame] <= frame) place = k + 1;
  int64_t unused = 0;
  warp_argmax(&place, &unused);
  c.inserted = place;
  return c;
}

// the decision for the stream; every block of a launch computes the same one
template <class A>
__device__ void decide_by_block(const Geometry& g, const Stream<A>& s, const int64_t* victim, Work<A>& work) {
  const int warp = warp_of();
  // clamped to the tier, since a given state may contain any number
  if (threadIdx.x < kLength + g.tiers) {
    const int tier = static_cast<int>(threadIdx.x) - kLength;
    const int64_t n = s.counter[threadIdx.x];
    work.counter[threadIdx.x] = tier < 0 ? n : n < 0 ? 0 : n > g.capacity[tier] ? g.capacity[tier] : n;
  }
  // each warp reads its own counter, because the shared copies are visible after the next barrier only
  if (warp < g.tiers && s.counter[kLength + warp] >= g.capacity[warp]) {
    const Leaving leaving = choose_by_warp(g, s, warp, s.counter[kSeen], g.capacity[warp], victim ? victim[warp] : -1);
    if (lane_of() == 0) work.leaving[warp] = leaving;
  }
  __syncthreads();
  const int64_t frame = work.counter[kSeen], *length = work.counter + kLength;
  if (threadIdx.x == 0) decide(g, frame, length, [&](int tier) { return work.leaving[tier]; }, &work.step);
  __syncthreads();
  if (warp < g.tiers) {
    const Change change = change_by_warp(g, s, work.step, warp, length[warp]);
    if (lane_of() == 0) work.change[warp] = change;
  }
  __syncthreads();
}

__host__ __device__ inline int64_t pair_items(const Geometry& g) {
  if (g.rule.choose == Rule::kAll) return g.M;
  return g.rule.choose == Rule::kAdjacent ? g.tiers * kLinksPerTier : 0;
}

// list place, in the new list, of the item-th link of adjacent rules that the step may change; -1 = none
__device__ inline int64_t place_of(const Change& c, const Step& step, int which) {
  const int64_t n = c.before - (c.removed >= 0) + (c.inserted >= 0);
  int64_t place;
  if (which < 2) {
    place = c.inserted < 0 ? -1 : c.inserted + which;
  } else {
    // the link that joins the removed entry's neighbours, and the merged slot's link to its older neighbour
    if (c.removed < 0 || (which == 3 && step.merged < 0)) return -1;
    place = which == 2 ? c.removed : c.removed - 1;
    if (place < 1) return -1;
    if (c.inserted >= 0 && place >= c.inserted) ++place;
    // the link behind the inserted slot is the second item's
    if (c.inserted >= 0 && place == c.inserted + 1) return -1;
  }
  return place < 1 || place >= n ? -1 : place;
}

// the item-th link that the step may change; the lists are still those before it
template <class A>
__device__ Pair pair_of(const Geometry& g, const Stream<A>& s, const Work<A>& work, int64_t item) {
  const Pair none{-1, -1, -1, -1, 0};
  if (g.rule.choose == Rule::kAll) {
    const int tier = g.tier_of(item);
    const Change& c = work.change[tier];
    const int64_t k = item - g.slot0[tier];
    if (c.inserted < 0 || k >= c.inserted) return none;
    // the entry is appended, so every other entry precedes it
    const int64_t other = kept_slot(g, s, c, tier, k), a = c.slot - g.slot0[tier], b = other - g.slot0[tier];
    return {c.slot, other, g.link0[tier] + a * g.capacity[tier] + b, g.link0[tier] + b * g.capacity[tier] + a, tier};
  }
  const int tier = static_cast<int>(item / kLinksPerTier);
  const Change& c = work.change[tier];
  const int64_t place = place_of(c, work.step, static_cast<int>(item % kLinksPerTier));
  if (place < 0) return none;
  const auto at = [&](int64_t k) {
    if (c.inserted >= 0 && k == c.inserted) return c.slot;
    return kept_slot(g, s, c, tier, c.inserted >= 0 && k > c.inserted ? k - 1 : k);
  };
  return {at(place - 1), at(place), g.link0[tier] + place, g.link0[tier] + place, tier};
}

}  // namespace vmemory::bank
