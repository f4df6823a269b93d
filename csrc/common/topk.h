// The k best of many scored slots, independent of the order in which threads find them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace vmemory {

template <class A>
struct Scored {
  A score;
  int64_t slot;
};

// the order of every choice by score: NaN first, then larger scores, equal ones by slot
template <class A>
inline bool ranks_before(const Scored<A>& a, const Scored<A>& b) {
  const bool a_nan = a.score != a.score, b_nan = b.score != b.score;
  if (a_nan || b_nan) return a_nan == b_nan ? a.slot < b.slot : a_nan;
  return a.score == b.score ? a.slot < b.slot : a.score > b.score;
}

// Candidates are collected behind the best k found so far and selected together, so a slot costs a comparison with
// the k-th best score, and no more than a constant on average if it passes.
template <class A>
class TopK {
 public:
  explicit TopK(int64_t k) : k_(k), capacity_(2 * k + 16) { held_.reserve(capacity_); }

  // scores of slots in ascending order, here and from call to call: a later slot with the k-th best score ranks behind
  void add(const A* score, const int64_t* slot, int64_t n) {
    constexpr int64_t kGroup = 64;
    for (int64_t i = 0; i < n; i += kGroup) {
      if (full_ && least_ != least_) return;
      const int64_t end = std::min(n, i + kGroup);
      int passing = !full_;
      // a NaN passes
      for (int64_t j = i; j < end; ++j) passing |= !(score[j] <= least_);
      if (!passing) continue;
      for (int64_t j = i; j < end; ++j)
        if (!full_ || !(score[j] <= least_)) push({score[j], slot[j]});
    }
  }

  void add(const Scored<A>& item) { push(item); }

  // the best min(k, added), best first
  const std::vector<Scored<A>>& finish() {
    if (static_cast<int64_t>(held_.size()) > k_) sift();
    std::sort(held_.begin(), held_.end(), ranks_before<A>);
    return held_;
  }

 private:
  void push(const Scored<A>& item) {
    held_.push_back(item);
    if (static_cast<int64_t>(held_.size()) == capacity_) sift();
  }

  void sift() {
    std::nth_element(held_.begin(), held_.begin() + (k_ - 1), held_.end(), ranks_before<A>);
    held_.resize(k_);
    least_ = held_.back().score;
    full_ = true;
  }

  int64_t k_, capacity_;
  bool full_ = false;
  A least_ = 0;
  std::vector<Scored<A>> held_;
};

}  // namespace vmemory
