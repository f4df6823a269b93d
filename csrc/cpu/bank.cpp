#include "contracts/bank.h"

#include <limits>

#include "common/bank_quantized.h"
#include "torch/stable.h"

namespace vmemory::bank {
namespace {

constexpr int64_t kParallelBytes = 1 << 20;  // one core reads a smaller frame as fast as two, and needs no waking

template <class A>
Stream<A> stream_of(const Geometry& g, int64_t i, const Tensor& descriptor, const Tensor& norm, const Tensor& link,
                    const Tensor& entry, const Tensor& clock, const Tensor& order, const Tensor& counter) {
  return {mutable_data<A>(descriptor) + i * g.M * g.R * g.K,
          mutable_data<A>(norm) + i * g.M * g.R,
          mutable_data<A>(link) + i * g.P,
          mutable_data<int64_t>(entry) + i * g.M * 4,
          mutable_data<double>(clock) + i * g.M * 4,
          mutable_data<int64_t>(order) + i * g.M,
          mutable_data<int64_t>(counter) + i * (kLength + g.tiers)};
}

Tensor bank_decide(const Tensor& norm, const Tensor& link, const Tensor& entry, const Tensor& order,
                   const Tensor& counter, std::optional<Tensor> streams_, std::optional<Tensor> victim_,
                   Ints capacities, Ints grids, Ints intervals, Ints entries, Ints rule) {
  const Geometry g = contract::bank_decide(norm, link, entry, order, counter, streams_, victim_,
                                           {capacities, grids, intervals, entries, rule});
  const Tensor streams = streams_ ? dense(*streams_) : counter, victim = victim_ ? dense(*victim_) : counter;
  const int64_t S = streams.size(0), size = kStepHead + 2 * g.tiers;
  Tensor out = make(order, {S, size});
  dispatch_floating(norm.scalar_type(), [&](auto t) {
    using A = acc_t<typename decltype(t)::type>;
    for (int64_t i = 0; i < S; ++i) {
      const int64_t at = streams_ ? data<int64_t>(streams)[i] : i;
      const bool there = at >= 0 && at < counter.size(0);
      const int64_t* chosen = victim_ ? data<int64_t>(victim) + i * g.tiers : nullptr;
      // decide() only reads, and neither descriptors nor clocks
      const auto stream = stream_of<A>(g, there ? at : 0, norm, norm, link, entry, norm, order, counter);
      write_step(g, there ? decide(g, stream, chosen) : Step(), mutable_data<int64_t>(out) + i * size);
    }
  });
  return out;
}

void bank_push_(const Tensor& slots, const Tensor& mass, const Tensor& descriptor, const Tensor& norm,
                const Tensor& link, const Tensor& entry, const Tensor& clock, const Tensor& order,
                const Tensor& counter, const Tensor& scale, const Tensor& frames_, std::optional<Tensor> time_,
                std::optional<Tensor> valid_, std::optional<Tensor> streams_, std::optional<Tensor> victim_,
                const Tensor& table_, Ints capacities, Ints grids, Ints intervals, Ints entries, Ints rule) {
  const Geometry g =
      contract::bank_push_(slots, mass, descriptor, norm, link, entry, clock, order, counter, scale, frames_, time_,
                           valid_, streams_, victim_, table_, {capacities, grids, intervals, entries, rule});
  const Tensor frames = dense(frames_), table = dense(table_);
  const Tensor valid = valid_ ? dense(*valid_) : frames, time = time_ ? dense(*time_) : frames;
  const Tensor streams = streams_ ? dense(*streams_) : frames, victim = victim_ ? dense(*victim_) : frames;
  const int64_t S = frames.size(0), N = frames.size(1), H = frames.size(2), W = frames.size(3), D = frames.size(4);
  const int64_t state_streams = slots.size(0);
  const auto push = [&](auto t, auto q) {
    using T = typename decltype(t)::type;
    using Q = typename decltype(q)::type;
    using A = acc_t<T>;
    const Maps<A> maps(g, data<A>(table));
    const auto push_stream = [&](int64_t i, bool alone) {
      const int64_t at = streams_ ? data<int64_t>(streams)[i] : i;
      if (at < 0 || at >= state_streams) return;
      T* tokens = nullptr;
      if constexpr (!kQuantized<Q>) tokens = mutable_data<T>(slots) + at * g.L * D;
      const Bank<T> bank{g, maps, stream_of<A>(g, at, descriptor, norm, link, entry, clock, order, counter), tokens,
                         mutable_data<float>(mass) + at * g.L};
      for (int64_t n = 0; n < N; ++n) {
        const int64_t f = i * N + n;
        const T* frame = data<T>(frames) + f * H * W * D;
        const bool* valid_cells = valid_ ? data<bool>(valid) + f * H * W : nullptr;
        const FrameMass frame_mass(g, valid_cells);
        const Step step = decide(g, bank.s, victim_ ? data<int64_t>(victim) + f * g.tiers : nullptr);
        if (step.first >= 0) {
          const auto passage = bank.prepare(step, frame, valid_cells, frame_mass.data());
          if constexpr (kQuantized<Q>) {
            const QuantizedRows<Q> rows{mutable_data<Q>(slots) + at * g.L * stored_elements<Q>(D),
                                        mutable_data<float>(scale) + at * g.L, D};
            QuantizedMove<T, Q>{bank, rows}(passage, [&](int64_t count, const auto& each) {
              alone ? parallel_bytes(count, H * W * D * sizeof(T), each) : each(0, count);
            });
          } else {
            // a slice of channels is a thread's own from the deepest tier to the new frame: no barrier inside a step
            const int64_t lanes = 64, blocks = (D + lanes - 1) / lanes;
            const int64_t grain = std::max<int64_t>(1, kParallelBytes / (H * W * lanes * sizeof(T) + 1));
            const auto slice = [&](int64_t begin, int64_t end) {
              bank.move(passage, begin * lanes, std::min(end * lanes, D));
            };
            alone&& blocks > grain ? parallel(blocks, grain, slice) : slice(0, blocks);
          }
          bank.move_mass(passage);
        }
        bank.commit(step, time_ ? data<double>(time)[f] : std::numeric_limits<double>::quiet_NaN(), frame_mass.total);
      }
    };
    if (S < torch::stable::get_num_threads()) {
      for (int64_t i = 0; i < S; ++i) push_stream(i, true);
    } else {
      parallel(S, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) push_stream(i, false);
      });
    }
  };
  dispatch_floating(frames.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    dispatch_stored<T>(slots.scalar_type(), [&](auto q) {
      // quantised tokens are computed in float32
      if constexpr (std::is_same_v<T, double> && kQuantized<typename decltype(q)::type>) {
        VMEMORY_CHECK(false, "frames: expected float32, float16 or bfloat16 for slots in 8 or 4 bits");
      } else {
        push(t, q);
      }
    });
  });
}

// One read of the whole video: descriptors of every frame and, while its cells are in cache, the pooled smallest tier.
// `pooled` [S, T, cells, D] is empty when a second read of the survivors is no dearer. Then the decisions are replayed
// on descriptors alone, stream by stream.
using Plan = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Plan bank_plan(const Tensor& frames_, std::optional<Tensor> time_, std::optional<Tensor> valid_, const Tensor& table_,
               Ints capacities, Ints grids, Ints intervals, Ints entries, Ints rule, int64_t R, int64_t K,
               int64_t small) {
  const Geometry g =
      contract::bank_plan(frames_, time_, valid_, table_, {capacities, grids, intervals, entries, rule}, R, K, small);
  const Tensor frames = dense(frames_), table = dense(table_);
  const Tensor valid = valid_ ? dense(*valid_) : frames, time = time_ ? dense(*time_) : frames;
  const int64_t S = frames.size(0), N = frames.size(1), H = frames.size(2), W = frames.size(3), D = frames.size(4);
  const int last = g.tiers - 1;
  const auto like = [&](Ints sizes, ScalarType type) { return make(frames, sizes, type); };
  const ScalarType wide = table.scalar_type();
  Tensor descriptor = like({S, g.M, R, K}, wide), norm = like({S, g.M, R}, wide), link = like({S, g.P}, wide);
  Tensor entry = like({S, g.M, 4}, ScalarType::Long), clock = like({S, g.M, 4}, ScalarType::Double);
  Tensor order = like({S, g.M}, ScalarType::Long), counter = like({S, kLength + g.tiers}, ScalarType::Long);
  Tensor assign = like({S, N}, ScalarType::Long), pooled = make(frames, {S, N, small, D});
  Tensor seen = like({S, N, R, K}, wide);
  std::fill_n(mutable_data<int64_t>(entry), S * g.M * 4, -1);
  std::fill_n(mutable_data<int64_t>(order), S * g.M, -1);
  std::fill_n(mutable_data<int64_t>(assign), S * N, -1);
  std::fill_n(mutable_data<int64_t>(counter), S * (kLength + g.tiers), 0);
  std::fill_n(mutable_data<double>(clock), S * g.M * 4, 0.0);
  dispatch_floating(frames.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    using A = acc_t<T>;
    std::fill_n(mutable_data<A>(descriptor), S * g.M * R * K, A(0));
    std::fill_n(mutable_data<A>(norm), S * g.M * R, A(0));
    std::fill_n(mutable_data<A>(link), S * g.P, A(0));
    const Maps<A> maps(g, data<A>(table));
    const auto cells_of = [&](int64_t f) { return valid_ ? data<bool>(valid) + f * H * W : nullptr; };
    const Scatter<A> whole(small ? Windows<A>(maps.row(0, last), maps.column(0, last), nullptr) : Windows<A>(), H * W);
    parallel(S * N, 1, [&](int64_t begin, int64_t end) {
      std::vector<A> sums(small * D);
      for (int64_t f = begin; f < end; ++f) {
        const int source = g.entry_tier(f % N);
        if (source < 0) continue;
        const T* frame = data<T>(frames) + f * H * W * D;
        const Describe<T> describe{g, maps, source, cells_of(f), mutable_data<A>(seen) + f * R * K};
        std::optional<Scatter<A>> uneven;
        if (small && valid_) {
          const FrameMass frame_mass(g, cells_of(f));
          uneven.emplace(Windows<A>(maps.row(0, last), maps.column(0, last), frame_mass.data()), H * W);
        }
        const Scatter<A>& scatter = uneven ? *uneven : whole;
        std::fill(sums.begin(), sums.end(), A(0));
        describe.clear(0, D);
        for (int64_t y = 0; y < H; ++y)
          for (int64_t x = 0, n; x < W; x += n) {
            n = describe.plain() ? std::min<int64_t>(4, W - x) : 1;
            const int64_t c = y * W + x, one = small ? scatter.common(c, n) : -1;
            A* to = one < 0 ? nullptr : sums.data() + one * D;
            const A weight = one < 0 ? A(0) : scatter.weight[scatter.first[c]];
            describe.add_cells(frame, y, x, nullptr, describe.plain() ? to : nullptr, weight, 0, D);
            if (!small || (to && describe.plain())) continue;
            // the rows are in the first-level cache now
            for (int64_t source = c; source < c + n; ++source)
              for (int64_t k = scatter.first[source]; k < scatter.first[source + 1]; ++k)
                add_row(frame + source * D, scatter.weight[k], sums.data() + scatter.target[k] * D, D);
          }
        describe.finish(0, D);
        if (small) scale_row(sums.data(), A(1), mutable_data<T>(pooled) + f * small * D, small * D);
      }
    });
    parallel(S, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Bank<T> bank{g, maps, stream_of<A>(g, i, descriptor, norm, link, entry, clock, order, counter)};
        int64_t* to = mutable_data<int64_t>(assign) + i * N;
        for (int64_t n = 0; n < N; ++n) {
          const Step step = decide(g, bank.s, nullptr);
          relabel(bank.s, step, n, to);
          if (step.first >= 0) bank.move_descriptors(step, data<A>(seen) + (i * N + n) * R * K);
          bank.commit(step, time_ ? data<double>(time)[i * N + n] : std::numeric_limits<double>::quiet_NaN(),
                      FrameMass(g, cells_of(i * N + n)).total);
        }
      }
    });
  });
  return {descriptor, norm, link, entry, clock, order, counter, assign, pooled};
}

// The tier from which frame t comes to a slot of `tier`, -1 where none of its maps leads there.
int source_of(const Geometry& g, int64_t t, int tier) {
  const int source = g.entry_tier(t);
  return source <= tier ? source : -1;
}

struct Survivors {
  const Geometry& g;
  const int64_t* assign;  // [T]
  const int64_t* entry;   // [M, 4]
  int64_t T;

  // f(t, source) for each frame that the slot holds, and the tier that it comes from
  template <class F>
  void frames_of(int64_t slot, const F& f) const {
    const int64_t first = entry[slot * 4 + kFirst], last = std::min(entry[slot * 4 + kLast], T - 1);
    if (first < 0) return;
    const int tier = g.tier_of(slot);
    for (int64_t t = first; t <= last; ++t)
      if (const int source = assign[t] == slot ? source_of(g, t, tier) : -1; source >= 0) f(t, source);
  }
};

std::tuple<Tensor, Tensor> bank_gather(const Tensor& frames_, std::optional<Tensor> valid_, const Tensor& pooled_,
                                       const Tensor& assign_, const Tensor& entry_, const Tensor& table_,
                                       Ints capacities, Ints grids, Ints intervals, Ints entries, Ints rule) {
  const Geometry g = contract::bank_gather(frames_, valid_, pooled_, assign_, entry_, table_,
                                           {capacities, grids, intervals, entries, rule});
  const Tensor frames = dense(frames_), pooled = dense(pooled_), assign = dense(assign_), entry = dense(entry_);
  const Tensor table = dense(table_);
  const Tensor valid = valid_ ? dense(*valid_) : frames;
  const int64_t S = frames.size(0), N = frames.size(1), H = frames.size(2), W = frames.size(3), D = frames.size(4);
  const int64_t small = pooled.size(2);
  Tensor slots = make(frames, {S, g.L, D}), mass = make(frames, {S, g.L}, ScalarType::Float);
  dispatch_floating(frames.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    using A = acc_t<T>;
    const Maps<A> maps(g, data<A>(table));
    for (int64_t i = 0; i < S; ++i) {
      const Survivors survivors{g, data<int64_t>(assign) + i * N, data<int64_t>(entry) + i * g.M * 4, N};
      for (int tier = 0; tier < g.tiers; ++tier) {
        const int64_t w = g.width[tier];
        const A ratio = static_cast<A>(H * W) / static_cast<A>(g.cells(tier));
        // by cell, not by slot, so that every thread has the same share of every slot
        parallel(g.cells(tier), 1, [&](int64_t begin, int64_t end) {
          Windows<A> window;
          std::vector<A> sum(D);
          std::vector<float> frame_mass(valid_ ? H * W : 0);
          for (int64_t slot = g.slot0[tier]; slot < g.slot0[tier] + g.capacity[tier]; ++slot)
            for (int64_t cell = begin; cell < end; ++cell) {
              const int64_t row = i * g.L + g.row_of(slot) + cell;
              T* to = mutable_data<T>(slots) + row * D;
              A held = 0;
              int64_t members = 0;
              const int64_t run = survivors.entry[slot * 4 + kFrames];
              survivors.frames_of(slot, [&](int64_t n, int source) {
                const T* frame = data<T>(frames) + (i * N + n) * H * W * D;
                const bool* cells = valid_ ? data<bool>(valid) + (i * N + n) * H * W : nullptr;
                if (cells) std::copy(cells, cells + H * W, frame_mass.begin());
                window.clear();
                window.add(maps.row(source, tier), maps.column(source, tier), cell / w, cell % w,
                           cells ? frame_mass.data() : nullptr);
                if (run > 1) {
                  if (members == 0) std::fill(sum.begin(), sum.end(), A(0));
                  for (size_t c = 0; c < window.cell.size(); ++c)
                    add_row(frame + window.cell[c] * D, window.weight[c] * window.held[0], sum.data(), D);
                } else if (small && tier == g.tiers - 1) {
                  const T* from = data<T>(pooled) + ((i * N + n) * small + cell) * D;
                  std::copy(from, from + D, to);
                } else {
                  pool_cell(window, 0, frame, D, to, 0, D);
                }
                held += window.held[0];
                ++members;
              });
              if (run > 1) scale_row(sum.data(), held == A(0) ? A(0) : A(1) / held, to, D);
              if (members == 0) std::fill(to, to + D, T{});
              mutable_data<float>(mass)[row] = static_cast<float>(held * ratio);
            }
        });
      }
    }
  });
  return {slots, mass};
}

Tensor bank_gather_backward(const Tensor& grad_, const Tensor& mass_, std::optional<Tensor> valid_,
                            const Tensor& assign_, const Tensor& table_, Ints grid, Ints capacities, Ints grids,
                            Ints intervals, Ints entries, Ints rule) {
  const Geometry g = contract::bank_gather_backward(grad_, mass_, valid_, assign_, table_, grid,
                                                    {capacities, grids, intervals, entries, rule});
  const Tensor grad = dense(grad_), mass = dense(mass_), assign = dense(assign_), table = dense(table_);
  const Tensor valid = valid_ ? dense(*valid_) : grad;
  const int64_t S = grad.size(0), D = grad.size(2), N = assign.size(1), H = grid[0], W = grid[1];
  Tensor out = make(grad, {S, N, H, W, D});
  dispatch_floating(grad.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    using A = acc_t<T>;
    const Maps<A> maps(g, data<A>(table));
    parallel(S * N, 1, [&](int64_t begin, int64_t end) {
      Windows<A> window;
      std::vector<A> sum(H * W * D);
      for (int64_t f = begin; f < end; ++f) {
        T* to = mutable_data<T>(out) + f * H * W * D;
        const int64_t slot = data<int64_t>(assign)[f];
        const int tier = slot >= 0 && slot < g.M ? g.tier_of(slot) : -1;
        const int source = source_of(g, f % N, tier);
        if (source < 0) {
          std::fill(to, to + H * W * D, T{});
          continue;
        }
        const A ratio = static_cast<A>(H * W) / static_cast<A>(g.cells(tier));
        const FrameMass frame_mass(g, valid_ ? data<bool>(valid) + f * H * W : nullptr);
        std::fill(sum.begin(), sum.end(), A(0));
        for (int64_t cell = 0; cell < g.cells(tier); ++cell) {
          const int64_t row = f / N * g.L + g.row_of(slot) + cell;
          const A held = static_cast<A>(data<float>(mass)[row]) / ratio;
          if (held == A(0)) continue;
          window.clear();
          window.add(maps.row(source, tier), maps.column(source, tier), cell / g.width[tier], cell % g.width[tier],
                     frame_mass.data());
          for (size_t c = 0; c < window.cell.size(); ++c)
            add_row(data<T>(grad) + row * D, window.weight[c] * window.held[0] / held, sum.data() + window.cell[c] * D,
                    D);
        }
        scale_row(sum.data(), A(1), to, H * W * D);
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace vmemory::bank

STABLE_TORCH_LIBRARY_IMPL(vmemory, CPU, m) {
  m.impl("bank_decide", TORCH_BOX(&vmemory::bank::bank_decide));
  m.impl("bank_push_", TORCH_BOX(&vmemory::bank::bank_push_));
  m.impl("bank_plan", TORCH_BOX(&vmemory::bank::bank_plan));
  m.impl("bank_gather", TORCH_BOX(&vmemory::bank::bank_gather));
  m.impl("bank_gather_backward", TORCH_BOX(&vmemory::bank::bank_gather_backward));
}
