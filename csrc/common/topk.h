// The k best of many scored rows, with one rule for ties: the larger score, of equals the lower index, NaN the largest.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

namespace vmemory {

template <class A>
struct Scored {
  A score;
  int64_t index;
};

template <class A>
inline bool better(const Scored<A>& a, const Scored<A>& b) {
  const bool nan_a = a.score != a.score, nan_b = b.score != b.score;
  if (nan_a || nan_b) return nan_a && (!nan_b || a.index < b.index);
  return a.score > b.score || (a.score == b.score && a.index < b.index);
}

// a bounded heap with the worst kept row on top
template <class A>
class TopK {
 public:
  explicit TopK(int64_t k) : k_(k) { heap_.reserve(k); }

  bool full() const { return static_cast<int64_t>(heap_.size()) == k_; }
  // a score below this cannot enter, whatever its index; one equal to it or NaN still has to ask
  A threshold() const { return full() && k_ > 0 ? heap_.front().score : -std::numeric_limits<A>::infinity(); }

  void offer(A score, int64_t index) {
    const Scored<A> row{score, index};
    if (!full()) {
      heap_.push_back(row);
      std::push_heap(heap_.begin(), heap_.end(), better<A>);
    } else if (k_ > 0 && better(row, heap_.front())) {
      std::pop_heap(heap_.begin(), heap_.end(), better<A>);
      heap_.back() = row;
      std::push_heap(heap_.begin(), heap_.end(), better<A>);
    }
  }

  void merge(const TopK& other) {
    for (const Scored<A>& row : other.heap_) offer(row.score, row.index);
  }

  // best first
  std::vector<Scored<A>> sorted() const {
    std::vector<Scored<A>> rows = heap_;
    std::sort(rows.begin(), rows.end(), better<A>);
    return rows;
  }

 private:
  int64_t k_;
  std::vector<Scored<A>> heap_;
};

}  // namespace vmemory
