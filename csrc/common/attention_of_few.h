// Attention of a few queries with keys in the lanes: every row of the memory is read once, for all heads together.
#pragma once

#include "common/attention.h"
#include "common/transpose.h"

namespace vmemory {

constexpr int64_t kFewQueries = 8;  // with more, queries fill the lanes

// The heads [first, first + heads) of a stream at a time. Sums run in the order of the kernel for many queries: a
// query's result does not depend on the number of queries.
template <class A>
class FewQueries {
 public:
  FewQueries(int64_t heads, int64_t queries, int64_t E)
      : queries_(queries),
        E_(E),
        wide_(round_up(E, kLanes<A>)),
        query_(heads * queries * wide_),
        out_(heads * queries * wide_),
        keys_(wide_ * kKeyBlock),
        most_(heads * queries),
        total_(heads * queries) {}

  template <class T, class Q>
  void attend(const SlotSizes& z, const T* query, const Slots<Q>& slots, int64_t s, int64_t first, int64_t heads,
              int64_t valid) {
    const int64_t states = heads * queries_;
    std::fill_n(query_.get(), states * wide_, A(0));
    std::fill_n(out_.get(), states * wide_, A(0));
    std::fill_n(most_.get(), states, -std::numeric_limits<A>::infinity());
    std::fill_n(total_.get(), states, A(0));
    const A scale = A(1 / std::sqrt(double(E_)));
    for (int64_t h = 0; h < heads; ++h) {
      const Rows<T> x = head_rows(query, nullptr, s, z.N, z.G, first + h, E_);
      for (int64_t i = 0; i < queries_; ++i)
        for_channels<A>(E_, [&](int64_t d, int64_t lanes) {
          store(query_.get() + (h * queries_ + i) * wide_ + d, load_some(x.row(i) + d, lanes) * scale);
        });
    }
    for (int64_t j = 0; j < valid; j += kKeyBlock) {
      const int64_t count = std::min(kKeyBlock, valid - j);
      // the heads of a row are contiguous, so all heads together read memory in sequence
      for (int64_t h = 0; h < heads; ++h) {
        lay_keys(slots.head_keys(z, s, first + h), j, count);
        const Rows<Q> values = slots.head_values(z, s, first + h);
        for (int64_t i = 0; i < queries_; ++i) add_block(h * queries_ + i, values, j, count);
      }
    }
  }

  template <class T>
  void write(int64_t h, int64_t valid, T* out, int64_t step, A* largest, A* sum) const {
    for (int64_t i = 0; i < queries_; ++i) {
      const int64_t at = h * queries_ + i;
      const A most = most_.get()[at], total = total_.get()[at];
      const A* from = out_.get() + at * wide_;
      for_channels<A>(E_, [&](int64_t d, int64_t lanes) {
        store_some(out + i * step + d, valid ? load(from + d) / broadcast(total) : vec<A>{}, lanes);
      });
      largest[i] = most > -std::numeric_limits<A>::infinity() ? most : A(0);
      sum[i] = total;
    }
  }

 private:
  // keys_[channel][key], channels and keys that do not exist are zero
  template <class Q>
  void lay_keys(const Rows<Q>& keys, int64_t first, int64_t count) {
    constexpr int64_t L = kLanes<A>;
    for (int64_t j = 0; j < count; j += L)
      for_channels<A>(E_, [&](int64_t d, int64_t lanes) {
        vec<A> x[L] = {};
        for (int64_t k = 0; k < std::min(L, count - j); ++k) x[k] = load_row(keys, first + j + k, d, lanes);
        transpose<A>(x);
        for (int64_t k = 0; k < L; ++k) store(keys_.get() + (d + k) * kKeyBlock + j, x[k]);
      });
  }

  template <class Q>
  static vec<A> load_row(const Rows<Q>& rows, int64_t i, int64_t d, int64_t lanes) {
    if constexpr (kQuantized<Q>) {
      return load_some_row<A>(rows.row(i), d, lanes) * broadcast<A>(rows.scale[i * rows.scale_step]);
    } else {
      return load_some(rows.row(i) + d, lanes);
    }
  }

  template <class Q>
  void add_block(int64_t at, const Rows<Q>& values, int64_t first, int64_t count) {
    constexpr int64_t L = kLanes<A>;
    alignas(64) A weight[kKeyBlock];
    score(query_.get() + at * wide_, count, weight);
    A largest = most_.get()[at];
    for (int64_t j = 0; j < count; ++j) largest = weight[j] > largest ? weight[j] : largest;
    // -inf - (-inf) would be NaN for a query whose scores so far are all -inf
    const vec<A> base = broadcast(largest > -std::numeric_limits<A>::infinity() ? largest : A(0));
    const vec<A> shrink = exp<A>(broadcast(most_.get()[at]) - base);
    for (int64_t j = 0; j < count; j += L) store(weight + j, exp<A>(load(weight + j) - base));
    A sum[4] = {};
    for (int64_t j = 0; j < count; ++j) sum[j % 4] += weight[j];
    const vec<A> total =
        broadcast(total_.get()[at]) * shrink + ((broadcast(sum[0]) + sum[1]) + (broadcast(sum[2]) + sum[3]));
    total_.get()[at] = total[0];
    most_.get()[at] = largest;
    A* out = out_.get() + at * wide_;
    for (int64_t e = 0; e < wide_; e += L) store(out + e, load(out + e) * shrink);
    int64_t e = 0;
    for (; e + 4 * L <= E_; e += 4 * L) weigh<4>(weight, values, first, count, e, out);
    for (; e < E_; e += L) weigh<1>(weight, values, first, count, e, out);
  }

  // channels [e, e + V vectors) of the block's weighted sum, added at the end as in product_tile
  template <int V, class Q>
  void weigh(const A* weight, const Rows<Q>& values, int64_t first, int64_t count, int64_t e, A* out) const {
    constexpr int64_t L = kLanes<A>;
    vec<A> part[V] = {};
    for (int64_t j = 0; j < count; ++j) {
      const vec<A> w = broadcast(weight[j]);
      unrolled<V>([&](auto v) __attribute__((always_inline)) {
        const int64_t at = e + v * L;
        part[v] = multiply_add(w, load_row(values, first + j, at, V > 1 ? L : std::min(L, E_ - at)), part[v]);
      });
    }
    for (int v = 0; v < V; ++v) store(out + e + v * L, load(out + e + v * L) + part[v]);
  }

  void score(const A* query, int64_t count, A* to) const {
    constexpr int64_t L = kLanes<A>;
    int64_t j = 0;
    for (; j + 8 * L <= count; j += 8 * L) score_vectors<8>(query, j, to + j);
    for (; j < count; j += L) score_vectors<1>(query, j, to + j);
  }

  template <int V>
  void score_vectors(const A* query, int64_t j, A* to) const {
    constexpr int64_t L = kLanes<A>;
    for (int64_t e = 0; e < E_; e += kChain) {
      vec<A> part[V] = {};
      for (int64_t d = e; d < std::min(E_, e + kChain); ++d) {
        const vec<A> x = broadcast(query[d]);
        unrolled<V>([&](auto v) __attribute__((always_inline)) {
          part[v] = multiply_add(load(keys_.get() + d * kKeyBlock + j + v * L), x, part[v]);
        });
      }
      for (int v = 0; v < V; ++v) store(to + v * L, e == 0 ? part[v] : load(to + v * L) + part[v]);
    }
  }

  int64_t queries_, E_, wide_;
  Lines<A> query_, out_, keys_, most_, total_;
};

}  // namespace vmemory
