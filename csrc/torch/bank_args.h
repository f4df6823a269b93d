// The bank operators' shared arguments: a geometry out of int lists.
#pragma once

#include "common/bank.h"
#include "torch/expect.h"

namespace vmemory::bank {

// a rule by its numbers: choose, victim, by_time, cascade, nan_first
inline Rule parse_rule(const Ints& numbers) {
  VMEMORY_CHECK(numbers.size() == 5 && numbers[0] >= Rule::kAdjacent && numbers[0] <= Rule::kOldest,
                "rule: expected choose, victim, by_time, cascade, nan_first");
  Rule rule;
  rule.choose = static_cast<Rule::Choose>(numbers[0]);
  rule.newer = numbers[1] == 1;
  rule.merge = numbers[1] == 2;
  rule.by_time = numbers[2] != 0;
  rule.cascade = numbers[3] != 0;
  rule.nan_first = numbers[4] != 0;
  return rule;
}

// a memory's tiers as operators receive them
struct Layout {
  const Ints &capacities, &grids, &intervals, &entries;
  const Ints& rule;

  // for frames [H, W, D] with R descriptors a slot of K channels
  Geometry geometry(int64_t H, int64_t W, int64_t D, int64_t R, int64_t K) const;

 private:
  void check(int64_t D, int64_t R, int64_t K) const;
};

inline void Layout::check(int64_t D, int64_t R, int64_t K) const {
  constexpr int64_t kMostSlots = int64_t(1) << 28, kMostCells = kMostSide;
  const int64_t tiers = static_cast<int64_t>(capacities.size()), levels = static_cast<int64_t>(intervals.size());
  VMEMORY_CHECK(tiers <= kMaxTiers && levels <= kMaxTiers, "capacities: expected at most 8 tiers");
  VMEMORY_CHECK(static_cast<int64_t>(grids.size()) == 2 * tiers && static_cast<int64_t>(entries.size()) == levels,
                "grids, entries: expected a pair per tier and an entry per interval");
  for (int64_t i = 0; i < tiers; ++i) {
    expect_int("capacities", capacities[i], 1, kMostSlots);
    for (const int64_t side : {grids[2 * i], grids[2 * i + 1]}) expect_int("grids", side, 1, kMostSide);
    VMEMORY_CHECK(grids[2 * i] <= kMostCells / grids[2 * i + 1], "grids: expected at most 2^20 cells a tier");
  }
  for (int64_t i = 0; i < levels; ++i) {
    expect_int("intervals", intervals[i], 1, std::numeric_limits<int64_t>::max());
    expect_int("entries", entries[i], -1, tiers - 1);
  }
  VMEMORY_CHECK(R == 1 || R == tiers, "descriptor: expected one a slot or one for each of ", tiers, " tiers, got ", R);
  expect_int("key_dim", K, 0, D);
}

inline Geometry Layout::geometry(int64_t H, int64_t W, int64_t D, int64_t R, int64_t K) const {
  check(D, R, K);
  Geometry g;
  g.rule = parse_rule(rule);
  g.tiers = static_cast<int>(capacities.size());
  g.levels = static_cast<int>(intervals.size());
  VMEMORY_CHECK(!g.rule.merge || g.tiers <= 1, "rule: merge has one tier");
  for (int i = 0; i < g.tiers; ++i) {
    g.capacity[i] = capacities[i];
    g.height[i] = grids[2 * i];
    g.width[i] = grids[2 * i + 1];
    g.slot0[i] = g.M;
    g.row0[i] = g.L;
    g.link0[i] = g.P;
    g.M += capacities[i];
    g.L += capacities[i] * g.cells(i);
    g.P += g.rule.choose == Rule::kAll ? capacities[i] * capacities[i] : capacities[i];
  }
  for (int i = 0; i < g.levels; ++i) {
    g.interval[i] = intervals[i];
    g.entry[i] = entries[i];
  }
  g.H = H;
  g.W = W;
  g.D = D;
  g.R = R;
  g.K = K;
  return g;
}

}  // namespace vmemory::bank
