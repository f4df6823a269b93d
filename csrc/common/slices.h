// Slices of channels, so that a few frames still feed every thread.
#pragma once

#include <algorithm>
#include <cstdint>

namespace vmemory {

// `items` independent items of D channels for `threads` threads; a slice is wide enough to be read in whole cache lines
struct Slices {
  int64_t D, count, width;

  Slices(int64_t D_, int64_t items, int64_t threads) : D(D_), count(1), width(D_) {
    if (threads == 1 || items >= 2 * threads || items == 0 || D < 512) return;
    count = std::min((2 * threads + items - 1) / items, D / 256);
    width = ((D + count - 1) / count + 63) / 64 * 64;
    count = (D + width - 1) / width;
  }
  int64_t begin(int64_t slice) const { return slice * width; }
  int64_t size(int64_t slice) const { return std::min(width, D - slice * width); }
};

}  // namespace vmemory
