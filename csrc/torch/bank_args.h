// The bank operators' shared arguments: a geometry out of int lists.
#pragma once

#include <string>

#include "common/bank.h"
#include "torch/stable.h"

namespace vmemory::bank {

inline Rule parse_rule(const std::string& name) {
  Rule rule;
  if (name == "paper") return rule;
  if (name == "videochat-online") {
    rule.by_time = rule.cascade = rule.nan_first = false;
  } else if (name == "all-pairs") {
    rule.choose = Rule::kAll;
    rule.newer = true;
    rule.by_time = rule.cascade = false;
  } else if (name == "merge") {
    rule.merge = true;
  } else if (name == "uniform") {
    rule.choose = Rule::kGap;
  } else if (name == "recent") {
    rule.choose = Rule::kOldest;
  } else {
    VMEMORY_CHECK(false, "rule: unknown rule ", name);
  }
  return rule;
}

inline Geometry parse_geometry(const Ints& capacities, const Ints& grids, const Ints& intervals, const Ints& entries,
                               const std::string& rule, int64_t H, int64_t W, int64_t D, int64_t R, int64_t K) {
  Geometry g;
  g.rule = parse_rule(rule);
  g.tiers = static_cast<int>(capacities.size());
  g.levels = static_cast<int>(intervals.size());
  VMEMORY_CHECK(g.tiers <= kMaxTiers && g.levels <= kMaxTiers, "capacities: expected at most 8 tiers");
  VMEMORY_CHECK(!g.rule.merge || g.tiers <= 1, "rule: merge has one tier");
  VMEMORY_CHECK(grids.size() == 2 * capacities.size() && entries.size() == intervals.size(),
                "grids, entries: expected a pair per tier and an entry per interval");
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
