// The best partner of every row of one set among the rows of another, by a matrix product of which no more than a tile
// exists at a time: rows of the first set lie in the lanes, where each keeps its best score and whose it was.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/lines.h"
#include "common/pair_tile.h"
#include "common/rows.h"

namespace vmemory {

// The order of the rows of a group of clips in matching: `cls` of each of `groups` clips of `tokens`, then the
// rest. Even rows from `front` on look for partners among the odd ones.
struct Sequence {
  int64_t tokens, cls, groups, front;

  int64_t rows() const { return groups * tokens; }
  int64_t evens() const { return (rows() + 1) / 2 - (front + 1) / 2; }
  int64_t odds() const { return rows() / 2 - front / 2; }
  int64_t even(int64_t i) const { return row(front + front % 2 + 2 * i); }
  int64_t odd(int64_t i) const { return row(front + 1 - front % 2 + 2 * i); }

  // the row in memory of a place in matching order
  int64_t row(int64_t place) const {
    if (groups == 1) return place;
    if (place < groups * cls) return place / cls * tokens + place % cls;
    const int64_t rest = place - groups * cls, width = tokens - cls;
    return rest / width * tokens + cls + rest % width;
  }
};

// the inverse norm of a row
template <class T>
acc_t<T> inverse_norm(const T* row, int64_t D) {
  using A = acc_t<T>;
  const A norm = std::sqrt(dot(row, row, D));
  return A(1) / (norm < A(1e-8) ? A(1e-8) : norm);
}

constexpr int64_t kPartners = 4 * kProductRows;  // partners per block
constexpr int64_t kMatchBytes = 7 << 16;         // packed rows that stay in the second-level cache beside them

// kPairs: bfloat16 as it is stored, in the processor's own products of pairs, and scaled afterwards
template <class T, bool kPairs>
class Matcher {
  using A = acc_t<T>;
  using E = std::conditional_t<kPairs, uint32_t, A>;  // what rows in lanes are made of
  using F = std::conditional_t<kPairs, T, A>;         // and partners
  using Places = decltype(vec<A>{} > vec<A>{});
  using Place = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  static constexpr int64_t L = kLanes<A>, kStack = kPairs ? 2 : 1;

 public:
  // vectors of rows that may be matched at once
  static int64_t most_vectors(int64_t D) {
    return std::max<int64_t>(1, kMatchBytes / ((D / kStack + 1) * L * sizeof(E)) / kProductVectors) * kProductVectors;
  }

  Matcher(int64_t vectors, int64_t D)
      : D_(round_up(D, kStack)),
        channels_(D),
        wide_(round_up(D, kStack * L) + kStack * L),  // a line more: rows of a power of two would share a cache set
        rows_(vectors * L * (D_ / kStack)),
        partners_(kPartners * wide_),
        factor_(kPartners),
        scores_(kProductRows * kProductVectors * L),
        best_(vectors * L),
        place_(vectors * L) {}

  // score[i] and partner[i] for even rows [first, first + count); `inverse`: inverse norms by row in memory
  void match(const T* x, const A* inverse, const Sequence& sequence, int64_t first, int64_t count, A* score,
             int64_t* partner) {
    const int64_t vectors = (count + L - 1) / L, odds = sequence.odds(), depth = D_ / kStack;
    for_vector_tiles(vectors, [&](int64_t v, int64_t width) {
      const int64_t begin = v * L, n = std::min(width * L, count - begin);
      E* to = rows_.get() + begin * depth;
      if (n < width * L) std::fill_n(to, width * L * depth, E(0));
      for (int64_t i = 0; i < n; ++i) {
        const int64_t row = sequence.even(first + begin + i);
        pack(x + row * channels_, inverse[row], width * L, to + i);
      }
    });
    std::fill_n(best_.get(), vectors * L, -std::numeric_limits<A>::infinity());
    for (int64_t j = 0; j < odds; j += kPartners) {
      const int64_t n = std::min(kPartners, odds - j), filled = tile_rows(n);
      for (int64_t i = 0; i < filled; ++i) {
        // the last tile repeats a row to be complete; the repeated scores are not used
        const int64_t row = sequence.odd(j + std::min(i, n - 1));
        factor_.get()[i] = inverse[row];
        copy(x + row * channels_, inverse[row], partners_.get() + i * wide_);
      }
      for_vector_tiles(vectors, [&](int64_t v, int64_t width) {
        for (int64_t i = 0; i < n; i += kProductRows) {
          multiply(rows_.get() + v * L * depth, width, partners_.get() + i * wide_);
          const int64_t some = std::min<int64_t>(kProductRows, n - i);
          for (int64_t w = 0; w < width; ++w) take_better(v, w, width, factor_.get() + i, j + i, some);
        }
      });
    }
    for (int64_t i = 0; i < count; ++i) {
      score[i] = kPairs ? best_.get()[i] * inverse[sequence.even(first + i)] : best_.get()[i];
      partner[i] = place_.get()[i];
    }
  }

 private:
  void pack(const T* row, A factor, int64_t step, E* to) const {
    if constexpr (kPairs) {
      for (int64_t d = 0; d < D_; d += 2) {
        const uint32_t high = d + 1 < channels_ ? row[d + 1].bits : 0;
        to[d / 2 * step] = high << 16 | row[d].bits;
      }
    } else {
      for_channels<A>(channels_, [&](int64_t d, int64_t lanes) {
        A value[L];
        store(value, load_some(row + d, lanes) * factor);
        for (int64_t k = 0; k < lanes; ++k) to[(d + k) * step] = value[k];
      });
    }
  }

  void copy(const T* row, A factor, F* to) const {
    if constexpr (kPairs) {
      std::copy_n(row, channels_, to);
      if (channels_ < D_) to[channels_] = T{};
    } else {
      for_channels<A>(channels_, [&](int64_t d, int64_t lanes) { store(to + d, load_some(row + d, lanes) * factor); });
    }
  }

  // short chains of sums round less
  void multiply(const E* rows, int64_t width, const F* partners) {
    constexpr int64_t kChain = 256;
    const int64_t step = width * L;
    for (int64_t d = 0; d == 0 || d < D_; d += kChain) {
      const int64_t chain = std::min(D_ - d, kChain);
      d == 0 ? tile<false>(width, partners, rows, chain)
             : tile<true>(width, partners + d, rows + d / kStack * step, chain);
    }
  }

  template <bool kAdd>
  void tile(int64_t width, const F* partners, const E* rows, int64_t chain) {
    const int64_t step = width * L;
    if constexpr (kPairs) {
      pair_tile<kAdd>(width, partners, wide_, rows, step, chain, scores_.get(), step);
    } else {
      product_tile<kAdd, false>(width, partners, wide_, rows, step, chain, scores_.get(), step);
    }
  }

  // NaN is the largest score; a later one has to be larger than the best so far
  void take_better(int64_t v, int64_t w, int64_t width, const A* factor, int64_t first, int64_t n) {
    A* best = best_.get() + (v + w) * L;
    Place* place = place_.get() + (v + w) * L;
    vec<A> most = load(best);
    Places at;
    std::memcpy(&at, place, sizeof at);
    for (int64_t i = 0; i < n; ++i) {
      vec<A> score = load(scores_.get() + (i * width + w) * L);
      if constexpr (kPairs) score *= factor[i];
      const Places better = (score > most) | ((score != score) & (most == most));
      most = better ? score : most;
      at = better ? Places{} + static_cast<Place>(first + i) : at;
    }
    store(best, most);
    std::memcpy(place, &at, sizeof at);
  }

  int64_t D_, channels_, wide_;
  Lines<E> rows_;
  Lines<F> partners_;
  Lines<A> factor_, scores_, best_;
  Lines<Place> place_;
};

}  // namespace vmemory
