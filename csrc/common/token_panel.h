// Products of weight matrices with blocks of tokens, the weights as they are stored.
#pragma once

#include <algorithm>
#include <memory>
#include <new>

#include "common/pair_tile.h"
#include "common/rows.h"
#include "common/transpose.h"

namespace vmemory {

// number of terms summed in a register before they are added to the total; more terms are faster and less exact
template <class T>
constexpr int64_t kDepth = sizeof(T) == 2 ? 512 : 64;

// the bits of bfloat16 in the upper halves, rounded to nearest even; the lower halves are undefined
inline vec_u32 rounded_bits(vec<float> x) {
  const vec_u32 bits = reinterpret_cast<vec_u32>(x);
  const auto is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return is_nan ? (bits | 0x00400000u) : bits + 0x7fffu + ((bits >> 16) & 1u);
}

// Tokens of a block are contiguous, one channel per row: a weight matrix is then read without packing, and
// the second product reads the result of the first in place. Stored as vectors of A or, kPairs, as pairs of bfloat16
// of neighbouring channels.
template <class T, bool kPairs>
struct Panel {
  using A = acc_t<T>;
  using E = std::conditional_t<kPairs, uint32_t, A>;
  static constexpr int64_t L = kLanes<A>;
  static constexpr int64_t kStack = kPairs ? 2 : 1;

  struct Free {
    void operator()(E* p) const { ::operator delete[](p, std::align_val_t(64)); }
  };

  Panel(int64_t channels, int64_t vectors)
      : step(vectors * L), held(new (std::align_val_t(64)) E[channels * vectors * L]) {}

  E* row(int64_t channel) const { return held.get() + channel / kStack * step; }

  vec<A> get(int64_t channel, int64_t t) const {
    if constexpr (kPairs) {
      vec_u32 bits;
      std::memcpy(&bits, row(channel) + t, sizeof bits);
      return reinterpret_cast<vec<A>>(channel % 2 ? bits & 0xffff0000u : bits << 16);
    } else {
      return load(row(channel) + t);
    }
  }

  // channels c and c + 1; the second is ignored if channels are not paired
  void put(int64_t c, int64_t t, vec<A> first, vec<A> second) const {
    if constexpr (kPairs) {
      const vec_u32 both = rounded_bits(first) >> 16 | (rounded_bits(second) & 0xffff0000u);
      std::memcpy(row(c) + t, &both, sizeof both);
    } else {
      store(row(c) + t, first);
    }
  }

  // f(channel, t, next channel of the pair) over everything
  template <class F>
  void for_pairs(int64_t channels, const F& f) const {
    for (int64_t c = 0; c < channels; c += kStack)
      for (int64_t t = 0; t < step; t += L) f(c, t, c + kStack - 1);
  }

  // rows of tokens in storage, kStack channels a lane
  using Word = std::conditional_t<kPairs, float, T>;

  void read(const T* from, int64_t tokens, int64_t channels, int64_t first_channel) const {
    const Word* words = reinterpret_cast<const Word*>(from);
    const int64_t width = channels / kStack;
    for (int64_t t = 0; t < step; t += L)
      for_channels<A>(width, [&](int64_t d, int64_t lanes) {
        vec<A> square[L];
        for (int64_t i = 0; i < L; ++i)
          square[i] = t + i < tokens ? load_some(words + (t + i) * width + d, lanes) : vec<A>{};
        transpose<A>(square);
        for (int64_t i = 0; i < lanes; ++i)
          std::memcpy(row(first_channel + (d + i) * kStack) + t, &square[i], sizeof square[i]);
      });
  }

  void write(T* to, int64_t tokens, int64_t channels, int64_t first_channel) const {
    Word* words = reinterpret_cast<Word*>(to);
    const int64_t width = channels / kStack;
    for (int64_t t = 0; t < tokens; t += L)
      for_channels<A>(width, [&](int64_t d, int64_t lanes) {
        vec<A> square[L];
        for (int64_t i = 0; i < L; ++i) {
          square[i] = vec<A>{};
          if (i < lanes) std::memcpy(&square[i], row(first_channel + (d + i) * kStack) + t, sizeof square[i]);
        }
        transpose<A>(square);
        for (int64_t i = 0; i < std::min(L, tokens - t); ++i) store_some(words + (t + i) * width + d, square[i], lanes);
      });
  }

  int64_t step;
  std::unique_ptr<E[], Free> held;
};

// tile [kProductRows][step] = weight's rows times the panel
template <class T, bool kPairs>
void multiply(const T* weight, int64_t rows, int64_t K, const Panel<T, kPairs>& panel, acc_t<T>* tile) {
  using A = acc_t<T>;
  using S = std::conditional_t<kPairs, T, A>;
  const int64_t vectors = panel.step / kLanes<A>;
  alignas(64) S strip[kProductRows * kDepth<T>];
  if (K == 0) std::fill_n(tile, kProductRows * panel.step, A(0));
  for (int64_t k = 0; k < K; k += kDepth<T>) {
    const int64_t depth = std::min(kDepth<T>, K - k);
    const S* a = strip;
    int64_t a_step = kDepth<T>;
    bool as_stored = false;
    if constexpr (std::is_same_v<S, T>) as_stored = rows == kProductRows;
    if (as_stored) {
      a = reinterpret_cast<const S*>(weight) + k, a_step = K;
    } else {
      for (int64_t r = 0; r < kProductRows; ++r)
        for_channels<A>(r < rows ? depth : 0, [&](int64_t d, int64_t lanes) {
          store_some(strip + r * kDepth<T> + d, load_some(weight + r * K + k + d, lanes), lanes);
        });
    }
    const auto* b = panel.row(k);
    if constexpr (kPairs) {
      k ? pair_tile<true>(vectors, a, a_step, b, panel.step, depth, tile, panel.step)
        : pair_tile<false>(vectors, a, a_step, b, panel.step, depth, tile, panel.step);
    } else {
      k ? product_tile<true, false>(vectors, a, a_step, b, panel.step, depth, tile, panel.step)
        : product_tile<false, false>(vectors, a, a_step, b, panel.step, depth, tile, panel.step);
    }
  }
}

// f(channel, t, x, y) over the pairs of channels and vectors of tokens of weight times panel plus bias, where there is
// one; y is the next channel's where channels come in pairs
template <class T, bool kPairs, class F>
void for_products(const T* weight, const T* bias, int64_t rows, int64_t K, const Panel<T, kPairs>& panel, const F& f) {
  using A = acc_t<T>;
  constexpr int64_t L = kLanes<A>, kStack = Panel<T, kPairs>::kStack;
  alignas(64) A tile[kProductRows * kProductVectors * L];
  for (int64_t row = 0; row < rows; row += kProductRows) {
    const int64_t now = std::min<int64_t>(kProductRows, rows - row);
    multiply(weight + row * K, now, K, panel, tile);
    for (int64_t r = 0; r < now; r += kStack) {
      const auto shift = [&](int64_t c) { return bias ? broadcast<A>(load(bias + c, 1)[0]) : vec<A>{}; };
      const vec<A> first = shift(row + r), second = shift(row + r + kStack - 1);
      for (int64_t t = 0; t < panel.step; t += L)
        f(row + r, t, load(tile + r * panel.step + t) + first, load(tile + (r + kStack - 1) * panel.step + t) + second);
    }
  }
}

// n tokens in blocks of whole vectors, even ones, at least as many as threads where there are so many vectors
template <class A>
struct TokenBlocks {
  TokenBlocks(int64_t n, int64_t threads) : n(n), vectors((n + kLanes<A> - 1) / kLanes<A>) {
    const int64_t least = std::min(vectors, threads);
    count = n == 0 ? 0 : std::min(vectors, round_up((vectors + kProductVectors - 1) / kProductVectors, least));
  }

  // f(first token, tokens, vectors) of a block
  template <class F>
  void visit(int64_t block, const F& f) const {
    const int64_t first = block * vectors / count, width = (block + 1) * vectors / count - first;
    f(first * kLanes<A>, std::min(width * kLanes<A>, n - first * kLanes<A>), width);
  }

  int64_t n, vectors, count;
};

}  // namespace vmemory
