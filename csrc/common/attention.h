// Shared parts of attention over blocks of keys: rows of one head, queries in transposed tiles, blocks of keys.
#pragma once

#include <algorithm>
#include <limits>
#include <memory>

#include "common/lines.h"
#include "common/math.h"
#include "common/product_tile.h"
#include "common/rows.h"

namespace vmemory {

constexpr int64_t kKeyBlock = 128;
static_assert(kKeyBlock % kProductRows == 0, "what holds a block of keys has no room for half a tile more");
constexpr int64_t kSmallAttention = 1 << 18;  // multiplications below which a second thread costs more than it saves

// a memory of M slots of n rows each, of which the first min(count, M) are valid
struct SlotSizes {
  int64_t S, N, G, E, M, n;
  int64_t rows() const { return M * n; }
  int64_t valid(const int64_t* count, int64_t s) const { return std::clamp<int64_t>(count[s], 0, M) * n; }
};

// rows of one head: E channels each, `step` elements apart; those stored in int8 or nibbles have a scale each
template <class T>
struct Rows {
  const T* at;
  int64_t step, E;
  const float* scale;
  int64_t scale_step;
  const T* row(int64_t i) const { return at + i * step; }
};

// x [S, rows, G, E] and, for quantised ones, scale [S, rows, G]: head g of stream s
template <class T>
Rows<T> head_rows(const T* x, const float* scale, int64_t s, int64_t rows, int64_t G, int64_t g, int64_t E) {
  const int64_t first = s * rows * G + g, stored = stored_elements<T>(E);
  return {x + first * stored, G * stored, E, scale ? scale + first : nullptr, G};
}

// keys and values [S, M, n, G, E], quantised ones with scales [S, M, n, G]
template <class T>
struct Slots {
  const T *keys, *values;
  const float *key_scale, *value_scale;
  Rows<T> head_keys(const SlotSizes& z, int64_t s, int64_t g) const {
    return head_rows(keys, key_scale, s, z.rows(), z.G, g, z.E);
  }
  Rows<T> head_values(const SlotSizes& z, int64_t s, int64_t g) const {
    return head_rows(values, value_scale, s, z.rows(), z.G, g, z.E);
  }
};

// channels as stored in scratch: whole vectors, and whole tiles where channels are rows
template <class A>
int64_t padded_channels(int64_t E) {
  return tile_rows(round_up(E, kLanes<A>));
}

// rows in the accumulation type, `wide` apart, channels beyond E and rows beyond `count` up to `filled` zero
template <class T, class A>
void copy_rows(const Rows<T>& x, int64_t first, int64_t count, int64_t filled, int64_t wide, A* to) {
  for (int64_t i = 0; i < count; ++i, to += wide) {
    const T* from = x.row(first + i);
    if constexpr (kQuantized<T>) {
      const vec<A> scale = broadcast<A>(x.scale[(first + i) * x.scale_step]);
      for_channels<A>(x.E, [&](int64_t d, int64_t lanes) { store(to + d, load_some_row<A>(from, d, lanes) * scale); });
    } else {
      for_channels<A>(x.E, [&](int64_t d, int64_t lanes) { store(to + d, load_some(from + d, lanes)); });
    }
    const int64_t done = round_up(x.E, kLanes<A>);
    std::fill(to + done, to + wide, A(0));
  }
  std::fill(to, to + (filled - count) * wide, A(0));
}

// rows [count][wide] to groups of kProductRows channels, [wide / kProductRows][count][kProductRows]
template <class A>
void interleave(const A* rows, int64_t count, int64_t wide, A* to) {
  constexpr int R = kProductRows;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t c = 0; c < wide / R; ++c)
      std::memcpy(to + (c * count + i) * R, rows + i * wide + c * R, R * sizeof(A));
}

// rows to columns: to[e * width + i] = row i's channel e times a factor, the columns beyond `count` zero
template <class T, class A>
void transpose_rows(const Rows<T>& x, int64_t first, int64_t count, int64_t width, A factor, A* to) {
  std::fill(to, to + x.E * width, A(0));
  for (int64_t i = 0; i < count; ++i) {
    const T* from = x.row(first + i);
    for_channels<A>(x.E, [&](int64_t d, int64_t lanes) {
      A value[kLanes<A>];
      store(value, load_some(from + d, lanes) * factor);
      for (int64_t k = 0; k < lanes; ++k) to[(d + k) * width + i] = value[k];
    });
  }
}

// A tile of queries: [first, first + count) of a piece, in whole vectors.
struct QueryTile {
  int64_t first, count, vectors;
  template <class A>
  int64_t width() const {
    return vectors * kLanes<A>;
  }
};

// f(tile) over n queries
template <class A, class F>
void for_query_tiles(int64_t n, const F& f) {
  constexpr int64_t L = kLanes<A>;
  for_vector_tiles((n + L - 1) / L, [&](int64_t vector, int64_t vectors) {
    f(QueryTile{vector * L, std::min(vectors * L, n - vector * L), vectors});
  });
}

// number of terms of a score that are summed in sequence before they are added to the total; short chains round less,
// and the error of a weight follows that of its score
constexpr int64_t kChain = 32;

// scores[key][query] of a block of keys, rows of `wide`, and a tile of queries
template <class A>
void score_tile(const A* keys, int64_t count, int64_t wide, const A* query, int64_t E, const QueryTile& tile, A* to) {
  const int64_t width = tile.width<A>(), chain = std::min(E, kChain);
  for (int64_t j = 0; j < count; j += kProductRows) {
    product_tile<false, false>(tile.vectors, keys + j * wide, wide, query, width, chain, to + j * width, width);
    for (int64_t e = chain; e < E; e += kChain)
      product_tile<true, false>(tile.vectors, keys + j * wide + e, wide, query + e * width, width,
                                std::min(kChain, E - e), to + j * width, width);
  }
}

// Cuts `heads` heads of n queries into pieces so that every thread has work; each piece reads the keys again.
inline int64_t pieces_of(int64_t heads, int64_t units, int64_t least, int64_t threads) {
  if (threads == 1 || heads == 0) return 1;
  const int64_t wanted = (4 * threads + heads - 1) / heads;
  return std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, units / least));
}

}  // namespace vmemory
