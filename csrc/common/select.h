// Selection of the largest by radix: keys that sort like the scores, and the cut that keeps k of them.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <functional>
#include <vector>

#include "common/vec.h"

namespace vmemory {

// bits of a score and of positive infinity
template <class T>
struct score_bits {
  using type = uint16_t;
  static constexpr type infinity = 0x7c00;
  static constexpr type of(T x) { return x.bits; }
};
template <>
struct score_bits<bf16> {
  using type = uint16_t;
  static constexpr type infinity = 0x7f80;
  static constexpr type of(bf16 x) { return x.bits; }
};
template <>
struct score_bits<float> {
  using type = uint32_t;
  static constexpr type infinity = 0x7f800000u;
  static constexpr type of(float x) { return std::bit_cast<uint32_t>(x); }
};
template <>
struct score_bits<double> {
  using type = uint64_t;
  static constexpr type infinity = 0x7ff0000000000000u;
  static constexpr type of(double x) { return std::bit_cast<uint64_t>(x); }
};
template <class T>
using key_t = typename score_bits<T>::type;

// Unsigned and in the order of the scores: both zeros are equal, NaN is the largest, and 0 is no score's key.
template <class T>
constexpr key_t<T> order_key(key_t<T> bits) {
  using U = key_t<T>;
  constexpr U sign = static_cast<U>(U(1) << (8 * sizeof(U) - 1));
  const U size = static_cast<U>(bits & static_cast<U>(~sign));
  const U signed_key = static_cast<U>(bits & sign ? static_cast<U>(~bits) : static_cast<U>(bits | sign));
  const U key = size == 0 ? sign : signed_key;
  return size > score_bits<T>::infinity ? static_cast<U>(~U(0)) : key;
}

// kept are the keys above `key` and the first `ties` that equal it
template <class U>
struct Cut {
  U key;
  int64_t ties;

  static constexpr Cut all() { return {0, 0}; }
  static constexpr Cut none() { return {static_cast<U>(~U(0)), 0}; }
};

template <class T>
void make_keys(const T* score, int64_t n, key_t<T>* key) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) key[i] = order_key<T>(score_bits<T>::of(score[i]));
}

constexpr int kRadixBits = 11;
constexpr int kRadix = 1 << kRadixBits;

// counts keys by their leading bits; neighbours use separate counters, so that equal keys do not wait for each other
template <class U>
class Histogram {
 public:
  Histogram() : part_(4 * kRadix) {}

  static int digit(U key) { return static_cast<int>(key >> (8 * sizeof(U) - kRadixBits)); }

  void add(const U* key, int64_t n) {
    int64_t i = 0;
    for (; i + 4 <= n; i += 4)
      for (int k = 0; k < 4; ++k) ++part_[k * kRadix + digit(key[i + k])];
    for (; i < n; ++i) ++part_[digit(key[i])];
  }
  int64_t count(int d) const {
    int64_t total = 0;
    for (int k = 0; k < 4; ++k) total += part_[k * kRadix + d];
    return total;
  }
  void clear() { std::fill(part_.begin(), part_.end(), 0u); }

 private:
  std::vector<uint32_t> part_;
};

// the cut among keys of one leading digit, of which `rank` (at least 1) are kept; reorders them
template <class U>
Cut<U> cut_among(U* key, int64_t n, int64_t rank) {
  std::nth_element(key, key + rank - 1, key + n, std::greater<U>());
  const U at = key[rank - 1];
  return {at, rank - std::count_if(key, key + rank - 1, [at](U k) { return k > at; })};
}

// f(i) for the positions of the keys that the cut keeps, ascending; ties are used up in order
template <class U, class F>
void each_kept(const U* key, int64_t n, Cut<U> cut, const F& f) {
  constexpr int64_t kBlock = 64;
  for (int64_t base = 0; base < n; base += kBlock) {
    const int64_t size = std::min(kBlock, n - base);
    uint64_t mask = 0;
#if defined(__AVX512F__)
    if constexpr (sizeof(U) == 4) {
      if (size == kBlock) {
        const __m512i least = _mm512_set1_epi32(static_cast<int>(cut.key));
        for (int k = 0; k < 4; ++k) {
          const __m512i keys = _mm512_loadu_si512(key + base + 16 * k);
          mask |= static_cast<uint64_t>(_mm512_cmpge_epu32_mask(keys, least)) << (16 * k);
        }
      }
    }
    if (sizeof(U) != 4 || size < kBlock)
#endif
      for (int64_t k = 0; k < size; ++k) mask |= static_cast<uint64_t>(key[base + k] >= cut.key) << k;
    for (; mask; mask &= mask - 1) {
      const int64_t i = base + std::countr_zero(mask);
      if (key[i] == cut.key && --cut.ties < 0) continue;
      f(i);
    }
  }
}

// one row with segments: keys are distributed to their segments, each finds its cut, and one pass keeps the order
template <class T>
class SegmentedRow {
  using U = key_t<T>;

 public:
  SegmentedRow(int64_t n, const std::vector<int64_t>& budgets)
      : n_(n),
        G_(static_cast<int64_t>(budgets.size())),
        budgets_(budgets),
        key_(n),
        dealt_(n),
        end_(G_ + 1),
        cut_(G_) {}

  int64_t select(const T* score, const int64_t* segment, int64_t* out) {
    make_keys(score, n_, key_.data());
    const auto id = [&](int64_t i) { return segment[i] < 0 || segment[i] >= G_ ? G_ : segment[i]; };
    std::fill(end_.begin(), end_.end(), 0);
    for (int64_t i = 0; i < n_; ++i) ++end_[id(i)];
    for (int64_t g = 0, first = 0; g <= G_; ++g) {
      const int64_t size = end_[g];
      end_[g] = first;
      first += size;
    }
    for (int64_t i = 0; i < n_; ++i) dealt_[end_[id(i)]++] = key_[i];
    for (int64_t g = 0; g < G_; ++g) {
      const int64_t first = g ? end_[g - 1] : 0, size = end_[g] - first, budget = budgets_[g];
      if (budget >= size) {
        cut_[g] = Cut<U>::all();
      } else {
        cut_[g] = budget > 0 ? cut_among(dealt_.data() + first, size, budget) : Cut<U>::none();
      }
    }
    int64_t total = 0, kept = 0;
    for (const int64_t budget : budgets_) total += budget;
    // every token is written and only kept ones advance the position, because a branch would be mispredicted
    for (int64_t i = 0; i < n_ && kept < total; ++i) {
      const int64_t g = id(i);
      if (g == G_) continue;
      bool keep = key_[i] > cut_[g].key;
      if (key_[i] == cut_[g].key) keep = --cut_[g].ties >= 0;
      out[kept] = i;
      kept += keep;
    }
    return kept;
  }

 private:
  int64_t n_, G_;
  const std::vector<int64_t>& budgets_;
  std::vector<U> key_, dealt_;
  std::vector<int64_t> end_;
  std::vector<Cut<U>> cut_;
};

}  // namespace vmemory
