// The tiered memory's bookkeeping, host and device: the choice of a victim in a full tier, and the update of the lists.
// Raw pointers only; tokens and descriptors are moved by the caller between decide() and apply().
#pragma once

#include "common/bank_geometry.h"

namespace vmemory::bank {

// one stream's bookkeeping; decisions are computed in type A
template <class A>
struct Stream {
  A* descriptor;     // [M, R, K]
  A* norm;           // [M, R]
  A* link;           // [P]
  int64_t* entry;    // [M, 4]
  double* clock;     // [M, 4]
  int64_t* order;    // [M]
  int64_t* counter;  // [3 + tiers]
};

// the slot at a place of a tier's list
template <class A>
VMEMORY_HD int64_t listed(const Geometry& g, const Stream<A>& s, int tier, int64_t place) {
  return g.inside(tier, s.order[g.slot0[tier] + place]);
}

// the difference of any two frame numbers, without overflow
VMEMORY_HD inline int64_t frames_between(int64_t first, int64_t last) {
  return static_cast<int64_t>(static_cast<uint64_t>(last) - static_cast<uint64_t>(first));
}

// the changes of one frame, decided from the state before it, so that every block of a launch decides alike
struct Step {
  int first = -1;             // tier the frame enters, -1 = it leaves at once
  int length = 0;             // full tiers on its way down
  int64_t place[kMaxTiers];   // list place of each one's victim
  int64_t slot[kMaxTiers];    // its slot
  int64_t target[kMaxTiers];  // where it goes in the next tier, -1 = it leaves
  int64_t merged = -1;        // slot that the only victim is folded into, -1 = none
  int64_t fresh = -1;         // slot the frame takes
};

// list places whose link must be computed again, per tier
struct Dirty {
  int count[kMaxTiers] = {};
  int64_t place[kMaxTiers][4];

  VMEMORY_HD void add(int tier, int64_t p) { place[tier][count[tier]++] = p; }
  VMEMORY_HD void shift(int tier, int64_t from) {
    for (int i = 0; i < count[tier]; ++i)
      if (place[tier][i] >= from) ++place[tier][i];
  }
};

template <class A>
VMEMORY_HD inline bool is_nan(A x) {
  return x != x;
}

// larger, with NaN the largest of all and no pair of NaNs ordered: the first of equals stays
template <class A>
VMEMORY_HD inline bool exceeds(A a, A b) {
  return a > b || (is_nan(a) && !is_nan(b));
}

template <class A>
VMEMORY_HD inline bool is_finite(A x) {
  return x - x == A(0);
}

// the victim of a full tier
struct Leaving {
  int64_t place = 0;  // its list place
  int64_t slot = -1;
  int64_t merged = -1;  // slot that it is folded into, -1 = none
};

// which of the closest pair leaves; cosine is the pair's
template <class A>
VMEMORY_HD Leaving leaver(const Geometry& g, const Stream<A>& s, int tier, int64_t older, int64_t newer, A cosine) {
  if (g.rule.nan_first && is_nan(cosine)) {
    const A norm = s.norm[listed(g, s, tier, older) * g.R + g.descriptor_of(tier)];
    const int64_t place = is_finite(norm) ? newer : older;
    return {place, listed(g, s, tier, place), -1};
  }
  if (g.rule.merge) return {newer, listed(g, s, tier, newer), listed(g, s, tier, older)};
  const int64_t place = g.rule.newer ? newer : older;
  return {place, listed(g, s, tier, place), -1};
}

// The victim that a caller chose, by list place. A merging rule folds it into its older neighbour; the first of a list
// has none, so the next one is folded into it. An entry that is not finite is not merged.
template <class A>
VMEMORY_HD Leaving named(const Geometry& g, const Stream<A>& s, int tier, int64_t place) {
  const Leaving alone{place, listed(g, s, tier, place), -1};
  if (!g.rule.merge || g.capacity[tier] == 1) return alone;
  const int64_t newer = place > 0 ? place : 1, r = g.descriptor_of(tier);
  const int64_t a = listed(g, s, tier, newer - 1), b = listed(g, s, tier, newer);
  if (g.rule.nan_first && !(is_finite(s.norm[a * g.R + r]) && is_finite(s.norm[b * g.R + r]))) return alone;
  return {newer, b, a};
}

template <class A>
VMEMORY_HD Leaving choose(const Geometry& g, const Stream<A>& s, int tier, int64_t frame) {
  const int64_t n = s.counter[kLength + tier];
  if (n == 1 || g.rule.choose == Rule::kOldest) return {0, listed(g, s, tier, 0), -1};
  if (g.rule.choose == Rule::kGap) {
    int64_t best = 1, smallest = 0;
    const auto frame_at = [&](int64_t p) { return s.entry[listed(g, s, tier, p) * 4 + kFrame]; };
    for (int64_t p = 1; p < n; ++p) {
      const int64_t gap = frames_between(frame_at(p - 1), p + 1 < n ? frame_at(p + 1) : frame);
      if (p == 1 || gap < smallest) best = p, smallest = gap;
    }
    return {best, listed(g, s, tier, best), -1};
  }
  int64_t older = 0, newer = 1;
  const A* link = s.link + g.link0[tier];
  A best;
  if (g.rule.choose == Rule::kAll) {
    const int64_t c = g.capacity[tier];
    const auto at = [&](int64_t p) { return listed(g, s, tier, p) - g.slot0[tier]; };
    best = link[at(0) * c + at(1)];
    for (int64_t i = 0; i < n; ++i) {
      const A* row = link + at(i) * c;
      for (int64_t j = i + 1; j < n; ++j) {
        const A x = row[at(j)];
        if (exceeds(x, best)) best = x, older = i, newer = j;
      }
    }
  } else {
    best = link[1];
    for (int64_t p = 2; p < n; ++p)
      if (exceeds(link[p], best)) best = link[p], older = p - 1, newer = p;
  }
  return leaver(g, s, tier, older, newer, best);
}

// pick(tier) returns the victim of a full tier; length is the number of entries of each tier
template <class Pick>
VMEMORY_HD void decide(const Geometry& g, int64_t frame, const int64_t* length, const Pick& pick, Step* step) {
  step->length = 0;
  step->merged = step->fresh = -1;
  int tier = step->first = g.entry_tier(frame);
  if (tier < 0) return;
  bool full = length[tier] == g.capacity[tier];
  while (full) {
    const int i = step->length++;
    const Leaving leaving = pick(tier);
    step->place[i] = leaving.place;
    step->slot[i] = leaving.slot;
    step->merged = leaving.merged;
    step->target[i] = -1;
    if (i > 0) step->target[i - 1] = step->slot[i];
    if (step->merged >= 0 || tier + 1 == g.tiers || (!g.rule.cascade && step->length == 2)) break;
    ++tier;
    full = length[tier] == g.capacity[tier];
  }
  const int64_t free = full ? -1 : g.slot0[tier] + length[tier];
  if (!full && step->length > 0) step->target[step->length - 1] = free;
  step->fresh = step->length > 0 ? step->slot[0] : free;
}

// victim[tier] is the slot that a full tier gives up; a slot that it does not hold leaves the choice to the rule
template <class A>
Step decide(const Geometry& g, const Stream<A>& s, const int64_t* victim) {
  Step step;
  const int64_t frame = s.counter[kSeen];
  const auto pick = [&](int tier) {
    const int64_t n = s.counter[kLength + tier];
    for (int64_t p = 0; victim && victim[tier] >= 0 && p < n; ++p)
      if (listed(g, s, tier, p) == victim[tier]) return named(g, s, tier, p);
    return choose(g, s, tier, frame);
  };
  decide(g, frame, s.counter + kLength, pick, &step);
  return step;
}

// columns of a step as the operator returns it: these, then the slot that each tier gives up, then their targets
enum { kStepTier, kStepFresh, kStepMerged, kStepHead };

VMEMORY_HD inline void write_step(const Geometry& g, const Step& step, int64_t* out) {
  for (int k = 0; k < kStepHead + 2 * g.tiers; ++k) out[k] = -1;
  if (step.first < 0) return;
  out[kStepTier] = step.first;
  out[kStepFresh] = step.fresh;
  out[kStepMerged] = step.merged;
  for (int i = 0; i < step.length; ++i) {
    out[kStepHead + step.first + i] = step.slot[i];
    out[kStepHead + g.tiers + step.first + i] = step.merged >= 0 ? -1 : step.target[i];
  }
}

template <class A>
VMEMORY_HD void remove(const Geometry& g, const Stream<A>& s, int tier, int64_t place, Dirty* dirty) {
  int64_t* order = s.order + g.slot0[tier];
  A* link = s.link + g.link0[tier];
  const int64_t n = --s.counter[kLength + tier];
  const bool linked = g.rule.choose == Rule::kAdjacent;
  for (int64_t p = place; p < n; ++p) {
    order[p] = order[p + 1];
    if (linked) link[p] = link[p + 1];
  }
  order[n] = -1;
  if (linked && place > 0 && place < n) dirty->add(tier, place);
}

template <class A>
VMEMORY_HD void insert(const Geometry& g, const Stream<A>& s, int tier, int64_t slot, Dirty* dirty) {
  int64_t* order = s.order + g.slot0[tier];
  A* link = s.link + g.link0[tier];
  const int64_t n = s.counter[kLength + tier]++;
  const int64_t frame = s.entry[slot * 4 + kFrame];
  const bool linked = g.rule.choose == Rule::kAdjacent;
  int64_t place = n;
  while (place > 0 && g.rule.by_time && s.entry[listed(g, s, tier, place - 1) * 4 + kFrame] > frame) {
    order[place] = order[place - 1];
    if (linked) link[place] = link[place - 1];
    --place;
  }
  order[place] = slot;
  dirty->shift(tier, place);
  if (g.rule.choose == Rule::kAll) dirty->add(tier, place);
  if (!linked) return;
  if (place > 0) dirty->add(tier, place);
  if (place < n) dirty->add(tier, place + 1);
}

// updates lists, entries and counters; norms of demoted slots move along, the caller computes new ones
template <class A>
VMEMORY_HD void apply(const Geometry& g, const Stream<A>& s, const Step& step, double time, double mass, Dirty* dirty) {
  const int64_t frame = s.counter[kSeen]++;
  if (step.first < 0) {
    ++s.counter[kSkipped];
    return;
  }
  for (int i = step.length - 1; i >= 0; --i) {
    const int tier = step.first + i;
    const int64_t slot = step.slot[i], target = step.target[i];
    remove(g, s, tier, step.place[i], dirty);
    if (step.merged >= 0) {
      int64_t* a = s.entry + step.merged * 4;
      double* ca = s.clock + step.merged * 4;
      const int64_t* b = s.entry + slot * 4;
      const double* cb = s.clock + slot * 4;
      const double na = static_cast<double>(a[kFrames]), nb = static_cast<double>(b[kFrames]);
      ca[kTime] = (ca[kTime] * na + cb[kTime] * nb) / (na + nb);
      ca[kStop] = cb[kStop];
      ca[kMass] += cb[kMass];
      a[kLast] = b[kLast];
      a[kFrames] = static_cast<int64_t>(static_cast<uint64_t>(a[kFrames]) + static_cast<uint64_t>(b[kFrames]));
      if (step.place[i] > 1) dirty->add(tier, step.place[i] - 1);
    } else if (target >= 0) {
      for (int c = 0; c < 4; ++c) {
        s.entry[target * 4 + c] = s.entry[slot * 4 + c];
        s.clock[target * 4 + c] = s.clock[slot * 4 + c];
      }
      for (int64_t r = 0; r < g.R; ++r) s.norm[target * g.R + r] = s.norm[slot * g.R + r];
      insert(g, s, tier + 1, target, dirty);
    } else {
      ++s.counter[kDropped];
    }
  }
  int64_t* entry = s.entry + step.fresh * 4;
  double* clock = s.clock + step.fresh * 4;
  entry[kFrame] = entry[kFirst] = entry[kLast] = frame;
  entry[kFrames] = 1;
  clock[kTime] = clock[kStart] = clock[kStop] = time;
  clock[kMass] = mass;
  insert(g, s, step.first, step.fresh, dirty);
}

// the slot each frame of a video ends in, kept current while decisions are replayed
template <class A>
void relabel(const Stream<A>& s, const Step& step, int64_t frame, int64_t* assign) {
  for (int i = step.length - 1; i >= 0; --i) {
    const int64_t slot = step.slot[i], target = step.merged >= 0 ? step.merged : step.target[i];
    for (int64_t t = s.entry[slot * 4 + kFirst]; t <= s.entry[slot * 4 + kLast]; ++t)
      if (assign[t] == slot) assign[t] = target;
  }
  assign[frame] = step.fresh;
}

}  // namespace vmemory::bank
