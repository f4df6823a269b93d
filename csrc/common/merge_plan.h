// Builds a merge plan from the scores of the best partners.
#pragma once

#include "common/match.h"
#include "common/select.h"

namespace vmemory {

struct MergePlan {
  int64_t* place;  // [rows] the token that holds a row
  int64_t* order;  // [rows] rows by token, the one that keeps its place first
  int64_t* start;  // [rows - r + 1] where a token's rows start in order

  // the r even rows with the largest scores join their partners
  template <class A>
  void lay_out(const Sequence& sequence, int64_t r, const A* score, const int64_t* partner) const {
    const int64_t evens = sequence.evens(), odds = sequence.odds(), first_odd = sequence.front + evens - r;
    const std::vector<char> merged = largest(score, evens, r);
    std::fill_n(start, first_odd + odds + 1, int64_t(1));
    for (int64_t i = 0; i < evens; ++i)
      if (merged[i]) ++start[first_odd + partner[i]];
    for (int64_t t = 0, next = 0; t <= first_odd + odds; ++t) {
      const int64_t count = start[t];
      start[t] = next;
      next += count;
    }
    std::vector<int64_t> next(start + first_odd, start + first_odd + odds);
    const auto join = [&](int64_t row, int64_t token, int64_t at) {
      place[row] = token;
      order[at] = row;
    };
    for (int64_t t = 0; t < sequence.front; ++t) join(sequence.row(t), t, start[t]);
    for (int64_t j = 0; j < odds; ++j) join(sequence.odd(j), first_odd + j, next[j]++);
    for (int64_t i = 0, t = sequence.front; i < evens; ++i) {
      if (merged[i]) {
        join(sequence.even(i), first_odd + partner[i], next[partner[i]]++);
      } else {
        join(sequence.even(i), t, start[t]);
        ++t;
      }
    }
  }

 private:
  template <class A>
  static std::vector<char> largest(const A* score, int64_t n, int64_t k) {
    std::vector<char> chosen(n);
    if (k == 0) return chosen;
    std::vector<key_t<A>> key(n);
    make_keys(score, n, key.data());
    std::vector<key_t<A>> among = key;
    each_kept(key.data(), n, cut_among(among.data(), n, k), [&](int64_t i) { chosen[i] = 1; });
    return chosen;
  }
};

}  // namespace vmemory
