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
  std::vector<Windows<A>> step;       // reduction to the next tier of a frame whose cells all have one mass
  int tiers;

  Maps(const Geometry& g, const A* table) : tiers(g.tiers) {
    const MapOffsets at(g);
    for (int source = 0; source < tiers; ++source)
      for (int tier = source; tier < tiers; ++tier) {
        rows.emplace_back(table + at.rows[source][tier], g.H, g.height[tier]);
        columns.emplace_back(table + at.columns[source][tier], g.W, g.width[tier]);
      }
    for (int tier = 0; tier + 1 < tiers; ++tier) {
      step_rows.emplace_back(table + at.step_rows[tier], g.height[tier], g.height[tier + 1]);
      step_columns.emplace_back(table + at.step_columns[tier], g.width[tier], g.width[tier + 1]);
      step.emplace_back(step_rows[tier], step_columns[tier], nullptr);
    }
    if (g.R == 1) return;
    for (int source = 0; source < tiers; ++source)
      for (int tier = 0; tier < tiers; ++tier)
        share.push_back(tier < source ? std::vector<A>() : cell_shares(g, source, tier));
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

// Adds cells of a frame to its descriptors, channels [d0, d1) of the first K, in one order: streaming and planning sum
// in the same order, so that both decide alike. Cells that are not valid are not read.
template <class T>
struct Describe {
  using A = acc_t<T>;
  const Geometry& g;
  const Maps<A>& maps;
  int source;
  const bool* valid;  // may be null
  A* out;             // [R, K]

  // one plain mean over all channels: rows of the grid are summed in groups of four cells
  bool plain() const { return g.R == 1 && g.K == g.D && !valid; }
  int64_t first() const { return g.R > 1 ? source : 0; }
  A weight(int64_t r, int64_t c) const {
    return valid && !valid[c] ? A(0) : (g.R > 1 ? maps.share[source * g.tiers + r][c] : A(1));
  }
  void clear(int64_t d0, int64_t d1) const {
    for (int64_t r = 0; r < g.R; ++r)
      if (d0 < g.K) std::fill(out + r * g.K + d0, out + r * g.K + std::min(d1, g.K), A(0));
  }
  // grid rows [y0, y1), copied to `to` on the way unless it is null
  void add(const T* frame, int64_t y0, int64_t y1, T* to, int64_t d0, int64_t d1) const {
    for (int64_t y = y0; y < y1; ++y)
      for (int64_t x = 0; x < g.W; x += plain() ? 4 : 1) add_cells(frame, y, x, to, nullptr, A(0), d0, d1);
  }
  // the cell, or the group of up to four when plain(); `pooled` += weight * their sum unless it is null
  void add_cells(const T* frame, int64_t y, int64_t x, T* to, A* pooled, A pooled_weight, int64_t d0,
                 int64_t d1) const {
    const int64_t c = y * g.W + x;
    const T* from = frame + c * g.D + d0;
    T* copy = to ? to + c * g.D + d0 : nullptr;
    if (plain()) {
      add_group(from, g.D, std::min<int64_t>(4, g.W - x), copy, out + d0, pooled ? pooled + d0 : nullptr, pooled_weight,
                d1 - d0);
      return;
    }
    if (copy) std::copy(from, from + (d1 - d0), copy);
    const int64_t n = std::min(d1, g.K) - d0;
    for (int64_t r = first(); r < g.R && n > 0; ++r) {
      const A w = weight(r, c);
      if (w != A(0)) add_row(from, w, out + r * g.K + d0, n);
    }
  }
  void finish(int64_t d0, int64_t d1) const {
    for (int64_t r = first(); r < g.R; ++r) {
      A total = 0;
      for (int64_t c = 0; c < g.H * g.W; ++c) total += weight(r, c);
      if (total == A(0)) continue;
      for (int64_t d = d0; d < std::min(d1, g.K); ++d) out[r * g.K + d] /= total;
    }
  }
};

// a frame's cell masses as floats, or null if every cell exists
struct FrameMass {
  std::vector<float> mass;
  double total;

  FrameMass(const Geometry& g, const bool* valid) : total(static_cast<double>(g.H * g.W)) {
    if (!valid) return;
    mass.assign(valid, valid + g.H * g.W);
    total = static_cast<double>(std::count(valid, valid + g.H * g.W, true));
  }
  const float* data() const { return mass.empty() ? nullptr : mass.data(); }
};

template <class T>
struct Bank {
  using A = acc_t<T>;
  const Geometry& g;
  const Maps<A>& maps;
  Stream<A> s;
  T* slots = nullptr;     // [L, D]; null while planning
  float* mass = nullptr;  // [L]

  // The move of one frame: reductions are prepared once, then every slice of channels moves independently.
  struct Passage {
    Step step;
    const T* frame = nullptr;
    const bool* valid = nullptr;
    std::vector<Windows<A>> own;               // of frames with uneven masses
    const Windows<A>* demote[kMaxTiers] = {};  // null = nothing is reduced
    const Windows<A>* enter = nullptr;         // null = the frame is copied
  };

  Passage prepare(const Step& step, const T* frame, const bool* valid, const float* frame_mass) const {
    Passage p{step, frame, valid, {}};
    p.own.reserve(kMaxTiers + 1);
    for (int i = 0; i < step.length; ++i) {
      if (step.merged >= 0 || step.target[i] < 0) continue;
      const int tier = step.first + i;
      const float* m = mass + g.row_of(step.slot[i]);
      const bool even = std::all_of(m, m + g.cells(tier), [m](float x) { return x == *m; }) && *m > 0;
      if (!even) p.own.emplace_back(maps.step_rows[tier], maps.step_columns[tier], m);
      p.demote[i] = even ? &maps.step[tier] : &p.own.back();
    }
    if (g.height[step.first] != g.H || g.width[step.first] != g.W || frame_mass) {
      p.own.emplace_back(maps.row(step.first, step.first), maps.column(step.first, step.first), frame_mass);
      p.enter = &p.own.back();
    }
    return p;
  }

  // tokens and descriptors of one step, channels [d0, d1), deepest tier first
  void move(const Passage& p, int64_t d0, int64_t d1) const {
    const Step& step = p.step;
    for (int i = step.length - 1; i >= 0; --i) {
      const int64_t slot = step.slot[i], target = step.target[i];
      if (step.merged >= 0) {
        merge(step.merged, slot, step.first + i, d0, d1);
      } else if (target >= 0) {
        if (i > 0) pool_slot(*p.demote[i], slot, target, 0, p.demote[i]->height, d0, d1);
        copy_descriptor(slot, target, d0, d1);
      }
    }
    const Describe<T> describe{g, maps, step.first, p.valid, s.descriptor + step.fresh * g.R * g.K};
    describe.clear(d0, d1);
    const bool demotes = step.length > 0 && step.merged < 0 && step.target[0] >= 0;
    if (p.enter) {
      if (demotes) pool_slot(*p.demote[0], step.slot[0], step.target[0], 0, p.demote[0]->height, d0, d1);
      pool_cells(*p.enter, 0, g.cells(step.first), p.frame, row(step.fresh), g.D, d0, d1);
      describe.add(p.frame, 0, g.H, nullptr, d0, d1);
    } else {
      // the frame overwrites its victim's rows while they are in cache, as soon as no lower tier needs them
      int64_t done = 0;
      for (int64_t i = 0; demotes && i < p.demote[0]->height; ++i) {
        const AxisMap<A>& rows = maps.step_rows[step.first];
        pool_slot(*p.demote[0], step.slot[0], step.target[0], i, i + 1, d0, d1);
        const int64_t free = i + 1 < rows.m ? std::max(done, rows.begin(i + 1)) : g.H;
        describe.add(p.frame, done, free, row(step.fresh), d0, d1);
        done = free;
      }
      describe.add(p.frame, done, g.H, row(step.fresh), d0, d1);
    }
    describe.finish(d0, d1);
  }

  T* row(int64_t slot) const { return slots + g.row_of(slot) * g.D; }

  void pool_slot(const Windows<A>& windows, int64_t from, int64_t to, int64_t i0, int64_t i1, int64_t d0,
                 int64_t d1) const {
    pool_cells(windows, i0 * windows.width, i1 * windows.width, row(from), row(to), g.D, d0, d1);
  }

  void copy_descriptor(int64_t from, int64_t to, int64_t d0, int64_t d1) const {
    for (int64_t r = 0; r < g.R && d0 < g.K; ++r) {
      const A* x = s.descriptor + (from * g.R + r) * g.K;
      std::copy(x + d0, x + std::min(d1, g.K), s.descriptor + (to * g.R + r) * g.K + d0);
    }
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

  // a step on descriptors alone: `fresh` [R, K] are the new frame's
  void move_descriptors(const Step& step, const A* fresh) const {
    for (int i = step.length - 1; i >= 0; --i) {
      if (step.merged >= 0) {
        merge(step.merged, step.slot[i], step.first + i, 0, g.D);
      } else if (step.target[i] >= 0) {
        copy_descriptor(step.slot[i], step.target[i], 0, g.K);
      }
    }
    std::copy(fresh, fresh + g.R * g.K, s.descriptor + step.fresh * g.R * g.K);
  }

  // the number of source cells in each token, after the tokens have moved
  void move_mass(const Passage& p) const {
    const Step& step = p.step;
    for (int i = step.length - 1; i >= 0; --i) {
      const int tier = step.first + i;
      const float* from = mass + g.row_of(step.slot[i]);
      if (step.merged >= 0) {
        float* to = mass + g.row_of(step.merged);
        for (int64_t c = 0; c < g.cells(tier); ++c) to[c] += from[c];
      } else if (step.target[i] >= 0) {
        // the shared windows were made without masses, for equal masses
        const A scale = p.demote[i] == &maps.step[tier] ? static_cast<A>(*from) : A(1);
        write_mass(*p.demote[i], scale, g.cells(tier), mass + g.row_of(step.target[i]));
      }
    }
    float* fresh = mass + g.row_of(step.fresh);
    if (p.enter) {
      write_mass(*p.enter, A(1), g.H * g.W, fresh);
    } else {
      std::fill(fresh, fresh + g.cells(step.first), 1.0f);
    }
  }

  void write_mass(const Windows<A>& windows, A scale, int64_t cells, float* to) const {
    const size_t n = windows.held.size();
    for (size_t k = 0; k < n; ++k) to[k] = static_cast<float>(windows.held[k] * scale * (A(cells) / A(n)));
  }

  // after every channel has moved: lists, norms and the few links that changed
  void commit(const Step& step, double time, double total) const {
    Dirty dirty;
    apply(g, s, step, time, total, &dirty);
    if (step.first < 0) return;
    refresh_norm(step.fresh);
    if (step.merged >= 0) refresh_norm(step.merged);
    for (int tier = 0; tier < g.tiers; ++tier)
      for (int i = 0; i < dirty.count[tier]; ++i) refresh_link(tier, dirty.place[tier][i]);
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
    A* link = s.link + g.link0[tier];
    if (g.rule.choose != Rule::kAll) {
      link[place] = cosine(tier, listed(g, s, tier, place - 1), listed(g, s, tier, place));
      return;
    }
    const int64_t n = s.counter[kLength + tier], c = g.capacity[tier], slot = listed(g, s, tier, place);
    const int64_t at = slot - g.slot0[tier];
    for (int64_t p = 0; p < n; ++p) {
      const int64_t with = listed(g, s, tier, p), other = with - g.slot0[tier];
      if (p != place) link[at * c + other] = link[other * c + at] = cosine(tier, slot, with);
    }
  }
};

}  // namespace vmemory::bank
