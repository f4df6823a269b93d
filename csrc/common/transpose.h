// Blocks of rows turned into columns, a square of vectors at a time.
#pragma once

#include "common/dot_tile.h"

namespace vmemory {

// the blocks that differ in bit S of row and lane change places
template <int S, class A, int... I>
inline void exchange(vec<A>& a, vec<A>& b, std::integer_sequence<int, I...>) {
  constexpr int L = sizeof...(I);
  const vec<A> low = __builtin_shufflevector(a, b, ((I & S) == 0 ? I : L + I - S)...);
  const vec<A> high = __builtin_shufflevector(a, b, ((I & S) == 0 ? I + S : L + I)...);
  a = low, b = high;
}

template <int S, class A>
inline void exchange_all(vec<A>* rows) {
  constexpr int L = kLanes<A>;
  if constexpr (S < L) {
    unrolled<L>([&](auto i) __attribute__((always_inline)) {
      if constexpr ((i & S) == 0) exchange<S, A>(rows[i], rows[i + S], std::make_integer_sequence<int, L>{});
    });
    exchange_all<2 * S, A>(rows);
  }
}

// rows[i][j] becomes rows[j][i], kLanes<A> of each
template <class A>
inline void transpose(vec<A>* rows) {
  exchange_all<1, A>(rows);
}

}  // namespace vmemory
