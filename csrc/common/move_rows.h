// Rows moved by index, and where they came from.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace vmemory {

// rows of one tensor as bytes, because a move does not depend on the dtype
struct Rows {
  const char* from;
  char* to;
  int64_t bytes, length, kept;  // of a row; rows a stream before and after
  uint64_t padding;             // eight bytes that fill a row without a source

  void pad(char* row) const {
    for (int64_t b = 0; b < bytes; b += 8) std::memcpy(row + b, &padding, std::min<int64_t>(8, bytes - b));
  }

  template <int64_t kBytes>
  void move_small(const int64_t* keep, int64_t s, int64_t begin, int64_t end) const {
    for (int64_t k = begin; k < end; ++k) {
      char* row = to + (s * kept + k) * kBytes;
      if (static_cast<uint64_t>(keep[k]) < static_cast<uint64_t>(length)) {
        std::memcpy(row, from + (s * length + keep[k]) * kBytes, kBytes);
      } else {
        pad(row);
      }
    }
  }

  // rows [begin, end) of stream s; neighbours that stay neighbours move as one
  void move(const int64_t* keep, int64_t s, int64_t begin, int64_t end) const {
    if (bytes == 0) return;
    if (bytes == 8) return move_small<8>(keep, s, begin, end);
    if (bytes == 4) return move_small<4>(keep, s, begin, end);
    for (int64_t k = begin; k < end;) {
      char* row = to + (s * kept + k) * bytes;
      if (static_cast<uint64_t>(keep[k]) >= static_cast<uint64_t>(length)) {
        pad(row);
        ++k;
        continue;
      }
      int64_t run = 1;
      while (k + run < end && keep[k + run] == keep[k] + run && keep[k] + run < length) ++run;
      std::memcpy(row, from + (s * length + keep[k]) * bytes, run * bytes);
      k += run;
    }
  }
};

// where each row of a stream went: places[first[n]] to places[first[n + 1]], ascending
struct Inverse {
  std::vector<int64_t> first, places;

  Inverse(const int64_t* keep, int64_t K, int64_t N) : first(N + 2), places(K) {
    const auto inside = [N](int64_t n) { return n >= 0 && n < N; };
    for (int64_t k = 0; k < K; ++k)
      if (inside(keep[k])) ++first[keep[k] + 2];
    for (int64_t n = 0; n < N; ++n) first[n + 2] += first[n + 1];
    for (int64_t k = 0; k < K; ++k)
      if (inside(keep[k])) places[first[keep[k] + 1]++] = k;
  }
};

}  // namespace vmemory
