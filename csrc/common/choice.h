// The first of the largest values, NaN the largest of all.
#pragma once

#include <cstdint>

namespace vmemory {

// whether `x` is chosen over `best`, which precedes it
template <class A>
constexpr bool beats(A x, A best) {
  return x > best || (x != x && best == best);
}

// n values `step` apart, n at least 1
template <class A>
constexpr int64_t first_largest(const A* x, int64_t n, int64_t step) {
  int64_t best = 0;
  for (int64_t i = 1; i < n; ++i)
    if (beats(x[i * step], x[best * step])) best = i;
  return best;
}

}  // namespace vmemory
