// The rows of a memory that a search reads, with an optional filter.
#pragma once

#include <algorithm>
#include <cstring>

#include "common/dot_tile.h"

namespace vmemory {

constexpr int64_t kBlockRows = 128, kMostAhead = 64;

// In order, a block at a time, with as many behind it as are read ahead.
template <class T>
class SearchedRows {
 public:
  int64_t slot[kBlockRows + kMostAhead];
  const T* row[kBlockRows + kMostAhead];

  // rows `stored` elements apart, [begin, end) of them where `where`, which may be null
  SearchedRows(const T* first, int64_t stored, const bool* where, int64_t begin, int64_t end, int64_t ahead)
      : first_(first), stored_(stored), where_(where), at_(begin), end_(end), ahead_(ahead) {}

  // the size of the next block, 0 at the end; bytes after the last row may be read
  int64_t next() {
    std::copy(slot + taken_, slot + held_, slot);
    std::copy(row + taken_, row + held_, row);
    held_ -= taken_;
    const int64_t most = kBlockRows + ahead_;
    while (held_ < most && at_ < end_) {
      const int64_t n = std::min(most - held_, end_ - at_);
      if (!where_) {
        for (int64_t i = 0; i < n; ++i) take(at_ + i);
      } else {
        int64_t i = 0;
        for (uint64_t eight; i + 8 <= n; i += 8) {
          std::memcpy(&eight, where_ + at_ + i, 8);
          if (eight == 0) continue;
          for (int64_t j = i; j < i + 8; ++j)
            if (where_[at_ + j]) take(at_ + j);
        }
        for (; i < n; ++i)
          if (where_[at_ + i]) take(at_ + i);
      }
      at_ += n;
    }
    taken_ = std::min(held_, kBlockRows);
    for (int64_t i = held_; i < most && taken_ > 0; ++i) row[i] = row[held_ - 1];
    return taken_;
  }

 private:
  void take(int64_t i) {
    slot[held_] = i;
    row[held_++] = first_ + i * stored_;
  }

  const T* first_;
  int64_t stored_;
  const bool* where_;
  int64_t at_, end_, ahead_, taken_ = 0, held_ = 0;
};

// D channels in the accumulation type, the rest of the last vector zero; lines of a later row are read ahead
template <class A, class T>
void widen_row(const T* row, const T* later, int64_t D, A* out) {
  constexpr int64_t L = kLanes<A>, kLine = kLineChannels<T>;
  int64_t d = 0;
  for (; d + kLine <= D; d += kLine) {
    __builtin_prefetch(channel(later, d), 0, 2);
    unrolled<kLine / L>(
        [&](auto k) __attribute__((always_inline)) { store(out + d + k * L, load_row<A>(channel(row, d + k * L))); });
  }
  for (; d + L <= D; d += L) store(out + d, load_row<A>(channel(row, d)));
  if (d < D) store(out + d, load_row<A>(channel(row, d), D - d));
}

}  // namespace vmemory
