// The layout of a tiered memory: tiers, slots, token rows, links and reduction maps. Host and device.
#pragma once

#include <cstdint>

#ifndef VMEMORY_HD
#ifdef __CUDACC__
#define VMEMORY_HD __host__ __device__
#else
#define VMEMORY_HD
#endif
#endif

namespace vmemory::bank {

constexpr int kMaxTiers = 8;
// columns of entry, clock and counter
enum { kFrame, kFirst, kLast, kFrames };
enum { kTime, kStart, kStop, kMass };
enum { kSeen, kSkipped, kDropped, kLength };

struct Rule {
  enum Choose { kAdjacent, kAll, kGap, kOldest } choose = kAdjacent;
  bool newer = false;     // the newer of the closest pair leaves, else the older
  bool merge = false;     // the newer is folded into the older
  bool by_time = true;    // demoted frames are inserted by time, else appended
  bool cascade = true;    // through every tier, else what the second tier evicts is dropped
  bool nan_first = true;  // a frame with a non-finite descriptor leaves before any other
};

struct Geometry {
  Rule rule;
  int tiers = 0, levels = 0;
  int64_t capacity[kMaxTiers], height[kMaxTiers], width[kMaxTiers];
  int64_t slot0[kMaxTiers], row0[kMaxTiers], link0[kMaxTiers];
  int64_t interval[kMaxTiers], entry[kMaxTiers];
  int64_t M = 0, L = 0, P = 0;                // slots, token rows, links
  int64_t R = 1, K = 0, D = 0, H = 0, W = 0;  // descriptors a slot, key channels, channels, input grid

  VMEMORY_HD int tier_of(int64_t slot) const {
    int tier = tiers - 1;
    while (slot < slot0[tier]) --tier;
    return tier;
  }
  // the slot clamped to the tier, since a given list may contain any number
  VMEMORY_HD int64_t inside(int tier, int64_t slot) const {
    const int64_t last = slot0[tier] + capacity[tier] - 1;
    return slot < slot0[tier] ? slot0[tier] : slot > last ? last : slot;
  }
  VMEMORY_HD int64_t cells(int tier) const { return height[tier] * width[tier]; }
  VMEMORY_HD int64_t row_of(int64_t slot) const {
    const int tier = tier_of(slot);
    return row0[tier] + (slot - slot0[tier]) * cells(tier);
  }
  VMEMORY_HD int entry_tier(int64_t frame) const {
    if (levels == 0) return tiers ? 0 : -1;
    for (int i = 0; i < levels; ++i)
      if (frame % interval[i] == 0) return static_cast<int>(entry[i]);
    return -1;
  }
  VMEMORY_HD int64_t descriptor_of(int tier) const { return R > 1 ? tier : 0; }
};

// Offsets of maps in the packed table: for each source <= tier the composed row and column weights, tier by tier,
// then for each tier but the last the row and column weights of the step to the next.
struct MapOffsets {
  int64_t rows[kMaxTiers][kMaxTiers], columns[kMaxTiers][kMaxTiers];
  int64_t step_rows[kMaxTiers], step_columns[kMaxTiers];
  int64_t total = 0;

  explicit MapOffsets(const Geometry& g) {
    for (int source = 0; source < g.tiers; ++source)
      for (int tier = source; tier < g.tiers; ++tier) {
        rows[source][tier] = take(g.height[tier] * g.H);
        columns[source][tier] = take(g.width[tier] * g.W);
      }
    for (int tier = 0; tier + 1 < g.tiers; ++tier) {
      step_rows[tier] = take(g.height[tier + 1] * g.height[tier]);
      step_columns[tier] = take(g.width[tier + 1] * g.width[tier]);
    }
  }

 private:
  int64_t take(int64_t n) {
    const int64_t at = total;
    total += n;
    return at;
  }
};

}  // namespace vmemory::bank
