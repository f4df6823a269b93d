// The tiered memory on the host: reads a frame's descriptors and moves tokens, for a slice of channels. Torch-free.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/bank.h"
#include "common/pool_tokens.h"

namespace vmemory::bank {

// the table of maps as axis maps, made once a call
template <class A>
struct Maps {
  std::vector<AxisMap<A>> rows, columns, step_rows, step_columns;
  std::vector<std::vector<A>> share;  // per source and descriptor: weight of each input cell, [H * W]
  int tiers;

  Maps(const Geometry& g, const A* table) : tiers(g.tiers) {
    const MapOffsets at(g);
    for (int source = 0; source < g.tiers; ++source)
      for (int tier = source; tier < g.tiers; ++tier) {
        rows.emplace_back(table + at.rows[source][tier], g.H, g.height[tier]);
        columns.emplace_back(table + at.columns[source][tier], g.W, g.width[tier]);
      }
    for (int tier = 0; tier + 1 < g.tiers; ++tier) {
      step_rows.emplace_back(table + at.step_rows[tier], g.height[tier], g.height[tier + 1]);
      step_columns.emplace_back(table + at.step_columns[tier], g.width[tier], g.width[tier + 1]);
    }
    if (g.R > 1)
      for (int source = 0; source < tiers; ++source)
        for (int tier = 0; tier < tiers; ++tier) share.push_back(tier < source ? std::vector<A>() : cell_shares(g, source, tier));
  }
  // composed maps lie source by source, each from its own tier on
  int index(int source, int tier) const { return source * tiers - source * (source - 1) / 2 + tier - source; }
  const AxisMap<A>& row(int source, int tier) const { return rows[index(source, tier)]; }
  const AxisMap<A>& column(int source, int tier) const { return columns[index(source, tier)]; }

 private:
  std::vector<A> cell_shares(const Geometry& g, int source, int tier) const {
    const AxisMap<A>&r = row(source, tier), &c = column(source, tier);
    std::vector<A> out(g.H * g.W);
    for (int64_t y = 0; y < g.H; ++y)
      for (int64_t x = 0; x < g.W; ++x) {
        A wy = 0, wx = 0;
        for (int64_t i = 0; i < r.m; ++i) wy += r.at(i, y);
        for (int64_t j = 0; j < c.m; ++j) wx += c.at(j, x);
        out[y * g.W + x] = (wy / r.m) * (wx / c.m);
      }
    return out;
  }
};

// Descriptors of one frame, channels [d0, d1) of the first K, cell by cell in raster order: streaming and planning
// sum alike, so that both decide alike. `valid` may be null; cells of weight 0 are not read.
template <class T>
void describe(const Geometry& g, const Maps<acc_t<T>>& maps, int source, const T* frame, const bool* valid,
              acc_t<T>* out, int64_t d0, int64_t d1) {
  using A = acc_t<T>;
  constexpr int64_t L = kLanes<A>;
  d1 = std::min(d1, g.K);
  for (int64_t r = 0; r < g.R && d0 < d1; ++r) {
    A* to = out + r * g.K;
    std::fill(to + d0, to + d1, A(0));
    if (g.R > 1 && r < source) continue;
    const A* share = g.R > 1 ? maps.share[source * g.tiers + r].data() : nullptr;
    A total = 0;
    for (int64_t c = 0; c < g.H * g.W; ++c) {
      if (valid && !valid[c]) continue;
      const A w = share ? share[c] : A(1);
      if (w == A(0)) continue;
      total += w;
      const T* from = frame + c * g.D;
      int64_t d = d0;
      for (; d + L <= d1; d += L) store(to + d, load(to + d) + load(from + d) * w);
      if (d < d1) store(to + d, load(to + d, d1 - d) + load(from + d, d1 - d) * w, d1 - d);
    }
    if (total == A(0)) continue;
    for (int64_t d = d0; d < d1; ++d) to[d] /= total;
  }
}

template <class T>
struct Bank {
  using A = acc_t<T>;
  const Geometry& g;
  const Maps<A>& maps;
  Stream<A> s;
  T* slots = nullptr;     // [L, D]; null while planning
  float* mass = nullptr;  // [L]

  // tokens and descriptors of one step, channels [d0, d1), deepest tier first
  void move(const Step& step, const T* frame, const bool* valid, const float* frame_mass, int64_t d0, int64_t d1) const {
    for (int i = step.length - 1; i >= 0; --i) {
      const int tier = step.first + i;
      const int64_t slot = step.slot[i], target = step.target[i];
      if (step.merged >= 0) {
        merge(step.merged, slot, tier, d0, d1);
      } else if (target >= 0) {
        if (slots)
          pool_tokens(slots + g.row_of(slot) * g.D, mass + g.row_of(slot), maps.step_rows[tier], maps.step_columns[tier],
                      slots + g.row_of(target) * g.D, g.D, d0, d1);
        for (int64_t r = 0; r < g.R && d0 < g.K; ++r)
          std::copy(s.descriptor + (slot * g.R + r) * g.K + d0, s.descriptor + (slot * g.R + r) * g.K + std::min(d1, g.K),
                    s.descriptor + (target * g.R + r) * g.K + d0);
      }
    }
    if (slots) enter(step, frame, frame_mass, d0, d1);
    if (frame) describe(g, maps, step.first, frame, valid, s.descriptor + step.fresh * g.R * g.K, d0, d1);
  }

  void enter(const Step& step, const T* frame, const float* frame_mass, int64_t d0, int64_t d1) const {
    T* to = slots + g.row_of(step.fresh) * g.D;
    const bool whole = g.height[step.first] == g.H && g.width[step.first] == g.W && !frame_mass;
    if (!whole) {
      pool_tokens(frame, frame_mass, maps.row(step.first, step.first), maps.column(step.first, step.first), to, g.D, d0, d1);
      return;
    }
    for (int64_t c = 0; c < g.H * g.W; ++c) std::copy(frame + c * g.D + d0, frame + c * g.D + d1, to + c * g.D + d0);
  }

  void merge(int64_t a, int64_t b, int tier, int64_t d0, int64_t d1) const {
    constexpr int64_t L = kLanes<A>;
    if (slots) {
      const int64_t ra = g.row_of(a), rb = g.row_of(b);
      for (int64_t c = 0; c < g.cells(tier); ++c) {
        const A ma = mass[ra + c], mb = mass[rb + c];
        if (mb == A(0)) continue;
        const A wa = ma / (ma + mb);
        T* x = slots + (ra + c) * g.D;
        const T* y = slots + (rb + c) * g.D;
        int64_t d = d0;
        for (; d + L <= d1; d += L) store(x + d, load(x + d) * wa + load(y + d) * (1 - wa));
        if (d < d1) store(x + d, load(x + d, d1 - d) * wa + load(y + d, d1 - d) * (1 - wa), d1 - d);
      }
    }
    const double ma = s.clock[a * 4 + kMass], mb = s.clock[b * 4 + kMass];
    const A wa = ma + mb > 0 ? static_cast<A>(ma / (ma + mb)) : A(0.5);
    for (int64_t r = 0; r < g.R; ++r)
      for (int64_t d = d0; d < std::min(d1, g.K); ++d) {
        A* x = s.descriptor + (a * g.R + r) * g.K + d;
        *x = wa * *x + (1 - wa) * s.descriptor[(b * g.R + r) * g.K + d];
      }
  }

  // after every channel has moved: masses, lists, norms and the few links that changed
  void commit(const Step& step, const float* frame_mass, double time, double total) const {
    if (mass && step.first >= 0) move_mass(step, frame_mass);
    Dirty dirty;
    apply(g, s, step, time, total, &dirty);
    if (step.first < 0) return;
    refresh_norm(step.fresh);
    if (step.merged >= 0) refresh_norm(step.merged);
    for (int tier = 0; tier < g.tiers; ++tier)
      for (int i = 0; i < dirty.count[tier]; ++i) refresh_link(tier, dirty.place[tier][i]);
  }

  void move_mass(const Step& step, const float* frame_mass) const {
    for (int i = step.length - 1; i >= 0; --i) {
      const int tier = step.first + i;
      const float* from = mass + g.row_of(step.slot[i]);
      if (step.merged >= 0) {
        float* to = mass + g.row_of(step.merged);
        for (int64_t c = 0; c < g.cells(tier); ++c) to[c] += from[c];
      } else if (step.target[i] >= 0) {
        pool_mass(from, maps.step_rows[tier], maps.step_columns[tier], mass + g.row_of(step.target[i]));
      }
    }
    float* fresh = mass + g.row_of(step.fresh);
    if (frame_mass) {
      pool_mass(frame_mass, maps.row(step.first, step.first), maps.column(step.first, step.first), fresh);
    } else {
      const int64_t cells = g.cells(step.first);
      std::fill(fresh, fresh + cells, static_cast<float>(g.H * g.W) / static_cast<float>(cells));
    }
  }

  void refresh_norm(int64_t slot) const {
    for (int64_t r = 0; r < g.R; ++r) {
      const A* x = s.descriptor + (slot * g.R + r) * g.K;
      s.norm[slot * g.R + r] = std::sqrt(dot(x, x, g.K));
    }
  }

  A cosine(int tier, int64_t a, int64_t b) const {
    const int64_t r = g.descriptor_of(tier), ia = a * g.R + r, ib = b * g.R + r;
    const A eps = A(1e-8);
    const A na = s.norm[ia] < eps ? eps : s.norm[ia], nb = s.norm[ib] < eps ? eps : s.norm[ib];
    return dot(s.descriptor + ia * g.K, s.descriptor + ib * g.K, g.K) / (na * nb);
  }

  void refresh_link(int tier, int64_t place) const {
    const int64_t* order = s.order + g.slot0[tier];
    A* link = s.link + g.link0[tier];
    if (g.rule.choose != Rule::kAll) {
      link[place] = cosine(tier, order[place - 1], order[place]);
      return;
    }
    const int64_t n = s.counter[kLength + tier], c = g.capacity[tier], slot = order[place], at = slot - g.slot0[tier];
    for (int64_t p = 0; p < n; ++p) {
      const int64_t other = order[p] - g.slot0[tier];
      if (p != place) link[at * c + other] = link[other * c + at] = cosine(tier, slot, order[p]);
    }
  }
};

}  // namespace vmemory::bank
