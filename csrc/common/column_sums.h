// Recomputes the attention weights of one head, block by block of keys: queries in the lanes, keys in the rows.
#pragma once

#include "common/attention.h"

namespace vmemory {

struct MapSizes {
  int64_t S, N, G, E, M;
  bool causal;
  // keys [0, seen(i)) are seen by query i
  int64_t seen(int64_t i) const { return causal ? std::clamp<int64_t>(i + M - N + 1, 0, M) : M; }
};

// The queries [first, first + count) of one head, transposed, and blocks of its keys.
template <class A>
class ScoreBlocks {
 public:
  static constexpr int64_t L = kLanes<A>;

  ScoreBlocks(const MapSizes& z, int64_t queries)
      : z_(z),
        wide_(padded_channels<A>(z.E)),
        lanes_(round_up(queries, L)),
        query_(lanes_ * wide_),
        keys_(kKeyBlock * wide_),
        score_(kKeyBlock * kProductVectors * L) {}

  template <class T>
  void take_queries(const Rows<T>& query, int64_t first, int64_t count) {
    first_ = first, count_ = count;
    const A scale = A(1 / std::sqrt(double(z_.E)));
    for_query_tiles<A>(count, [&](const QueryTile& t) {
      transpose_rows(query, first + t.first, t.count, t.width<A>(), scale, query_.get() + t.first * wide_);
    });
  }
  template <class T>
  void take_keys(const Rows<T>& keys, int64_t first, int64_t count) {
    first_key_ = first, keys_taken_ = count;
    copy_rows(keys, first, count, tile_rows(count), wide_, keys_.get());
  }

  // f(tile) for the tiles whose last query sees the first key of the block; score(j) is computed before
  template <class F>
  void for_tiles(const F& f) {
    for_query_tiles<A>(count_, [&](const QueryTile& t) {
      if (z_.seen(first_ + t.first + t.count - 1) <= first_key_) return;
      score_tile(keys_.get(), keys_taken_, wide_, query_.get() + t.first * wide_, z_.E, t, score_.get());
      if (first_key_ + keys_taken_ > z_.seen(first_ + t.first)) hide(t);
      f(t);
    });
  }

  int64_t wide() const { return wide_; }
  int64_t lanes() const { return lanes_; }
  int64_t queries() const { return count_; }
  int64_t first_query() const { return first_; }
  int64_t first_key() const { return first_key_; }
  int64_t keys_taken() const { return keys_taken_; }
  const A* keys() const { return keys_.get(); }
  A* score(const QueryTile& t, int64_t j, int64_t w) const { return score_.get() + j * t.width<A>() + w * L; }

 private:
  void hide(const QueryTile& t) {
    for (int64_t i = 0; i < t.count; ++i) {
      const int64_t seen = z_.seen(first_ + t.first + i) - first_key_;
      for (int64_t j = std::max<int64_t>(seen, 0); j < keys_taken_; ++j)
        score(t, j, 0)[i] = -std::numeric_limits<A>::infinity();
    }
  }

  const MapSizes& z_;
  int64_t wide_, lanes_, first_ = 0, count_ = 0, first_key_ = 0, keys_taken_ = 0;
  Lines<A> query_, keys_, score_;
};

// For each query in the lanes: the largest score, the inverse of the sum, the number of visible keys, and the mean term
// of the backward pass.
template <class A>
struct QueryStats {
  using Int = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  Lines<A> most, inverse, delta;
  Lines<Int> seen;
  bool causal = false;
  explicit QueryStats(int64_t lanes) : most(lanes), inverse(lanes), delta(lanes), seen(lanes) {}

  void take(const MapSizes& z, const A* largest, const A* sum, int64_t first, int64_t count, int64_t lanes) {
    for (const Lines<A>* x : {&most, &inverse, &delta}) std::fill_n(x->get(), lanes, A(0));
    std::fill_n(seen.get(), lanes, Int(0));
    causal = z.causal;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t keys = z.seen(first + i);
      most.get()[i] = largest[first + i];
      inverse.get()[i] = keys > 0 ? A(1) / sum[first + i] : A(0);
      seen.get()[i] = static_cast<Int>(keys);
    }
  }

  // the weights of a key in vector w of a tile
  vec<A> weights(const QueryTile& t, int64_t w, const A* score) const {
    const int64_t at = t.first + w * kLanes<A>;
    return exp<A>(load(score) - load(most.get() + at)) * load(inverse.get() + at);
  }
  // x where a query exists and sees the key, else 0, even if x is NaN
  vec<A> where_seen(const QueryTile& t, int64_t w, int64_t key, vec<A> x) const {
    typedef Int ints __attribute__((vector_size(kVectorBytes)));
    if (!causal && t.count == t.width<A>()) return x;
    ints limit;
    std::memcpy(&limit, seen.get() + t.first + w * kLanes<A>, sizeof limit);
    return limit > static_cast<Int>(key) ? x : vec<A>{};
  }
};

}  // namespace vmemory
