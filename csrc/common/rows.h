// Sums of token rows, channel by channel.
#pragma once

#include <vector>

#include "common/vec.h"

namespace vmemory {

// whole vectors where they fit, the masked path for the last channels only
template <class T>
inline vec<acc_t<T>> load_some(const T* p, int64_t lanes) {
  return lanes == kLanes<acc_t<T>> ? load(p) : load(p, lanes);
}
template <class T>
inline void store_some(T* p, vec<acc_t<T>> x, int64_t lanes) {
  lanes == kLanes<acc_t<T>> ? store(p, x) : store(p, x, lanes);
}

// f(d, lanes) over the channels
template <class A, class F>
inline void for_channels(int64_t D, const F& f) {
  constexpr int64_t L = kLanes<A>;
  int64_t d = 0;
  for (; d + L <= D; d += L) f(d, L);
  if (d < D) f(d, D - d);
}

// A sum kept in three levels: sixteen terms make a block, sixteen blocks a section. The rounding error grows with the
// depth of the tree instead of the number of terms, and the levels stay in the first-level cache.
template <class A>
class LevelSum {
 public:
  explicit LevelSum(int64_t D = 0) : D_(D), level_(3 * D) {}

  void reset(int64_t D) {
    terms_ = 0;
    if (D == D_) return;
    D_ = D;
    level_.resize(3 * D);
  }

  // one more term at channels d..; `close` follows when every channel has it
  void add(int64_t d, vec<A> term, int64_t lanes) {
    A* to = level_.data() + d;
    store_some(to, terms_ % 16 ? load_some(to, lanes) + term : term, lanes);
  }
  void close() {
    ++terms_;
    if (terms_ % 16 == 0) carry(0, terms_ % 256 == 16);
    if (terms_ % 256 == 0) carry(1, terms_ == 256);
  }

  vec<A> total(int64_t d, int64_t lanes) const {
    const A* from = level_.data() + d;
    vec<A> s{};
    if (terms_ % 16) s = load_some(from, lanes);
    if (terms_ % 256 >= 16) s += load_some(from + D_, lanes);
    if (terms_ >= 256) s += load_some(from + 2 * D_, lanes);
    return s;
  }

 private:
  void carry(int level, bool first) {
    const A* from = level_.data() + level * D_;
    A* to = level_.data() + (level + 1) * D_;
    for_channels<A>(D_, [&](int64_t d, int64_t lanes) {
      const vec<A> s = load_some(from + d, lanes);
      store_some(to + d, first ? s : load_some(to + d, lanes) + s, lanes);
    });
  }

  int64_t D_, terms_ = 0;
  std::vector<A> level_;
};

// Prefetches the next rows into the second-level cache: parallel rows are too many and too short for the hardware
// prefetcher, which would cost half of the memory's bandwidth. A prefetch never faults.
template <int K, bool kWeighted, class T, class F>
inline void sum_group(const T* const* row, const T* const* next, const acc_t<T>* weight, int64_t D, const F& f) {
  using A = acc_t<T>;
  constexpr int64_t kLine = 64 / sizeof(T);
  const T *r[K], *ahead[K];
  A w[K];
  for (int k = 0; k < K; ++k) r[k] = row[k], ahead[k] = next[k], w[k] = kWeighted ? weight[k] : A(1);
  for_channels<A>(D, [&](int64_t d, int64_t lanes) {
    if (d % kLine == 0)
      for (int k = 0; k < K; ++k) __builtin_prefetch(ahead[k] + d, 0, 1);
    vec<A> part[K];
    for (int k = 0; k < K; ++k) part[k] = kWeighted ? load_some(r[k] + d, lanes) * w[k] : load_some(r[k] + d, lanes);
    for (int k = 2; k < K; ++k) part[k - 2] += part[k];
    f(d, K > 1 ? part[0] + part[K > 1 ? 1 : 0] : part[0], lanes);
  });
}

// f(d, sum of up to four rows at channels d.., lanes); `next` are as many rows that will be read after these
template <bool kWeighted, class T, class F>
void sum_few(const T* const* row, const T* const* next, const acc_t<T>* weight, int64_t n, int64_t D, const F& f) {
  using A = acc_t<T>;
  if (n == 4) {
    sum_group<4, kWeighted>(row, next, weight, D, f);
  } else if (n == 3) {
    sum_group<3, kWeighted>(row, next, weight, D, f);
  } else if (n == 2) {
    sum_group<2, kWeighted>(row, next, weight, D, f);
  } else if (n == 1) {
    sum_group<1, kWeighted>(row, next, weight, D, f);
  } else {
    for_channels<A>(D, [&](int64_t d, int64_t lanes) { f(d, vec<A>{}, lanes); });
  }
}

// f(d, sum of n rows at channels d.., lanes); row[n] to row[n + 3] are read next
template <bool kWeighted, class T, class F>
void sum_rows(const T* const* row, const acc_t<T>* weight, int64_t n, int64_t D, LevelSum<acc_t<T>>& levels,
              const F& f) {
  using A = acc_t<T>;
  if (n <= 4) return sum_few<kWeighted>(row, row + n, weight, n, D, f);
  levels.reset(D);
  for (int64_t g = 0; g < n; g += 4) {
    const int64_t size = n - g < 4 ? n - g : 4;
    sum_few<kWeighted>(row + g, row + g + size, weight + g, size, D,
                       [&](int64_t d, vec<A> s, int64_t lanes) { levels.add(d, s, lanes); });
    levels.close();
  }
  for_channels<A>(D, [&](int64_t d, int64_t lanes) { f(d, levels.total(d, lanes), lanes); });
}

}  // namespace vmemory
