// Selection by a block a part of a stream: a radix search for the cut of every segment, then the kept positions in
// order. The parts of a long stream add up their counts; each finds the same cut.
#pragma once

#include "common/select.h"
#include "cuda/language.cuh"

namespace vmemory::selection {

constexpr int kThreads = 1024;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr int kItems = 4;  // scores a thread has in flight
constexpr int kMaxSegments = 4096;
constexpr unsigned kWhole = ~0u;

// A block's data of each segment: the leading digits of its cut, the number kept among keys that share them, and
// a position: of equal keys those before the position are kept.
template <class U>
struct Search {
  U* prefix;
  unsigned *rank, *last, *histogram;

  __device__ Search(unsigned char* at, int segments) {
    prefix = reinterpret_cast<U*>(at);
    rank = reinterpret_cast<unsigned*>(at + (segments * sizeof(U) + 3) / 4 * 4);
    last = rank + segments;
    histogram = last + segments;
  }
  static int64_t bytes(int64_t segments, int bits) {
    const int64_t held = (segments * sizeof(U) + 3) / 4 * 4 + segments * (2 + (int64_t(1) << bits)) * sizeof(unsigned);
    return (held + 15) / 16 * 16;
  }
};

// one budget for every segment, or one each
template <class T, int kBudgets>
struct SelectArgs {
  const T* score;
  const int64_t* segment;    // null: one segment
  int64_t segment_step;      // 0 where all streams share a row
  unsigned char* workspace;  // null: shared memory
  int64_t workspace_bytes;
  unsigned* merged;  // [S, passes, segments << bits], zeros: the counts of all parts
  unsigned* held;    // [S, parts]: what each part keeps
  int64_t *index, *count;
  int64_t N, total, part;  // part: positions of one
  int segments, bits, parts, passes;
  int budget[kBudgets];
};

constexpr int kPart = kItems * kThreads;  // positions of a block at a time

// counts that a search takes: of the keys' digits, then of the positions'
template <class U>
int passes_of(int64_t N, int bits) {
  int of_positions = 0;
  while ((N - 1) >> of_positions) ++of_positions;
  return (static_cast<int>(8 * sizeof(U)) + bits - 1) / bits + (of_positions + bits - 1) / bits;
}

__device__ inline unsigned lane() { return threadIdx.x % kWarp; }
__device__ inline unsigned warp() { return threadIdx.x / kWarp; }

__device__ inline unsigned before_in_warp(unsigned x) {
  unsigned sum = x;
  for (int k = 1; k < kWarp; k *= 2) {
    const unsigned other = __shfl_up_sync(~0u, sum, k);
    if (lane() >= static_cast<unsigned>(k)) sum += other;
  }
  return sum - x;
}

template <class T, int kBudgets>
class Block {
  using U = key_t<T>;
  static constexpr int kKeyBits = 8 * sizeof(U);

 public:
  __device__ Block(const SelectArgs<T, kBudgets>& a, unsigned char* shared)
      : a_(a),
        stream_(blockIdx.x / a.parts),
        part_(blockIdx.x % a.parts),
        begin_(part_ * a.part),
        end_(begin_ + a.part < a.N ? begin_ + a.part : a.N),
        score_(a.score + stream_ * a.N),
        segment_(a.segment ? a.segment + stream_ * a.segment_step : nullptr),
        at_(a.workspace ? a.workspace + stream_ * a.workspace_bytes : shared, a.segments) {}

  __device__ void run() {
    for (int g = threadIdx.x; g < a_.segments; g += kThreads) {
      at_.prefix[g] = 0;
      at_.rank[g] = static_cast<unsigned>(a_.budget[kBudgets == 1 ? 0 : g]);
      at_.last[g] = 0;
    }
    for (int top = kKeyBits; top > 0; top -= a_.bits) key_digit(top);
    __syncthreads();
    const bool tied = finish_keys();
    // where streams have parts, all of them meet equally often
    if (tied || a_.parts > 1) {
      int bits = 0;
      while ((a_.N - 1) >> bits) ++bits;
      for (; bits > 0; bits -= a_.bits) position_digit(bits);
      __syncthreads();
      // the last position found is itself kept
      for (int g = threadIdx.x; g < a_.segments; g += kThreads)
        if (at_.rank[g] > 0) ++at_.last[g];
    }
    __syncthreads();
    emit();
  }

 private:
  struct Token {
    U key;
    int segment;  // -1: none
  };

  // the tokens at base + k * step, loaded together
  __device__ void load(int64_t base, Token (&token)[kItems], int step) const {
    T score[kItems];
    int64_t id[kItems];
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int64_t i = base + k * step;
      id[k] = i < end_ ? 0 : -1;
      if (i < end_) score[k] = score_[i];
      if (i < end_ && segment_) id[k] = segment_[i];
    }
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const bool there = id[k] >= 0 && id[k] < a_.segments;
      token[k].key = there ? order_key<T>(score_bits<T>::of(score[k])) : U(0);
      token[k].segment = there ? static_cast<int>(id[k]) : -1;
    }
  }

  // counts the digits that `digit(i, token)` gives, negative for those that do not take part
  template <class F>
  __device__ void count(int bits, const F& digit) {
    __syncthreads();
    for (int b = threadIdx.x; b < a_.segments << bits; b += kThreads) at_.histogram[b] = 0;
    __syncthreads();
    for (int64_t base = begin_; base < end_; base += kPart) {
      Token token[kItems];
      load(base + threadIdx.x, token, kThreads);
#pragma unroll
      for (int k = 0; k < kItems; ++k) {
        if (token[k].segment < 0) continue;
        const int d = digit(base + k * kThreads + threadIdx.x, token[k]);
        if (d >= 0) atomicAdd(at_.histogram + ((token[k].segment << bits) | d), 1u);
      }
    }
    __syncthreads();
    if (a_.parts > 1) add_parts(a_.segments << bits);
  }

  // the counts of all parts in the place of the block's
  __device__ void add_parts(int bins) {
    unsigned* merged = a_.merged + ((stream_ * a_.passes + pass_++) * a_.segments << a_.bits);
    for (int b = threadIdx.x; b < bins; b += kThreads)
      if (at_.histogram[b] > 0) atomicAdd(merged + b, at_.histogram[b]);
    cooperative_groups::this_grid().sync();
    for (int b = threadIdx.x; b < bins; b += kThreads) at_.histogram[b] = merged[b];
    __syncthreads();
  }

  struct Found {
    int digit;
    unsigned rank, held, total;
  };

  // by a warp: the digit where the running count reaches the rank, from the largest digit down or from the smallest up
  __device__ Found find(int g, int bits, bool down) const {
    const int bins = 1 << bits, per = bins < kWarp ? 1 : bins / kWarp, first = lane() * per;
    const unsigned* histogram = at_.histogram + (static_cast<int64_t>(g) << bits);
    const auto bin = [&](int k) { return down ? bins - 1 - k : k; };
    unsigned own = 0;
    for (int k = first; k < first + per && k < bins; ++k) own += histogram[bin(k)];
    const unsigned before = before_in_warp(own), rank = at_.rank[g];
    Found found{-1, 0, 0, __shfl_sync(~0u, before + own, kWarp - 1)};
    if (before < rank && rank <= before + own) {
      unsigned seen = before;
      int k = first;
      for (; seen + histogram[bin(k)] < rank; ++k) seen += histogram[bin(k)];
      found.digit = bin(k);
      found.rank = rank - seen;
      found.held = histogram[bin(k)];
    }
    const unsigned who = __ballot_sync(~0u, found.digit >= 0);
    const int from = who ? __ffs(who) - 1 : 0;
    found.digit = __shfl_sync(~0u, found.digit, from);
    found.rank = __shfl_sync(~0u, found.rank, from);
    found.held = __shfl_sync(~0u, found.held, from);
    return found;
  }

  // the digit of the keys below bit `top`
  __device__ void key_digit(int top) {
    const int bits = a_.bits < top ? a_.bits : top, shift = top - bits;
    count(bits, [&](int64_t, const Token& token) {
      const int g = token.segment;
      if (at_.rank[g] == 0 || ((token.key >> shift) >> bits) != at_.prefix[g]) return -1;
      return static_cast<int>((token.key >> shift) & ((U(1) << bits) - 1));
    });
    for (int g = warp(); g < a_.segments; g += kWarps) {
      const unsigned rank = at_.rank[g];
      if (rank == 0) continue;
      const Found found = find(g, bits, true);
      __syncwarp();
      if (lane() > 0) continue;
      if (top == kKeyBits && found.total <= rank) {
        at_.rank[g] = 0;
        at_.last[g] = kWhole;
      } else {
        at_.prefix[g] = static_cast<U>((at_.prefix[g] << bits) | static_cast<U>(found.digit));
        at_.rank[g] = found.rank;
        // after the last digit: all equal keys are kept
        if (shift == 0 && found.held == found.rank) at_.last[g] = kWhole, at_.rank[g] = 0;
      }
    }
  }

  // whether some segment keeps only some of its equal keys
  __device__ bool finish_keys() {
    bool tied = false;
    for (int g = threadIdx.x; g < a_.segments; g += kThreads) {
      tied |= at_.rank[g] > 0;
      // nothing is kept, not even of the largest keys
      if (at_.rank[g] == 0 && at_.last[g] == 0) at_.prefix[g] = static_cast<U>(~U(0));
    }
    return __syncthreads_or(tied);
  }

  // the digit below bit `top` of the position of the last equal key that is kept
  __device__ void position_digit(int top) {
    const int bits = a_.bits < top ? a_.bits : top, shift = top - bits;
    count(bits, [&](int64_t i, const Token& token) {
      const int g = token.segment;
      if (at_.rank[g] == 0 || token.key != at_.prefix[g] || (i >> top) != at_.last[g]) return -1;
      return static_cast<int>((i >> shift) & ((1 << bits) - 1));
    });
    for (int g = warp(); g < a_.segments; g += kWarps) {
      if (at_.rank[g] == 0) continue;
      const Found found = find(g, bits, false);
      __syncwarp();
      if (lane() > 0) continue;
      at_.last[g] = (at_.last[g] << bits) | static_cast<unsigned>(found.digit);
      at_.rank[g] = found.rank;
    }
  }

  __device__ bool keeps(const Token& token, int64_t i) const {
    if (token.segment < 0) return false;
    const U cut = at_.prefix[token.segment];
    return token.key > cut || (token.key == cut && i < at_.last[token.segment]);
  }

  // what the parts before this one keep
  __device__ int64_t kept_before() const {
    unsigned own = 0;
    for (int64_t base = begin_; base < end_; base += kPart) {
      Token token[kItems];
      load(base + threadIdx.x, token, kThreads);
#pragma unroll
      for (int k = 0; k < kItems; ++k) own += __syncthreads_count(keeps(token[k], base + k * kThreads + threadIdx.x));
    }
    unsigned* held = a_.held + stream_ * a_.parts;
    if (threadIdx.x == 0) held[part_] = own;
    cooperative_groups::this_grid().sync();
    int64_t kept = 0;
    for (int p = 0; p < part_; ++p) kept += held[p];
    return kept;
  }

  __device__ void emit() const {
    VMEMORY_SHARED(held, unsigned[kWarps]);
    int64_t* out = a_.index + stream_ * a_.total;
    int64_t kept = a_.parts > 1 ? kept_before() : 0;
    for (int64_t base = begin_; base < end_; base += kPart) {
      const int64_t first = base + warp() * (kItems * kWarp);
      Token token[kItems];
      load(first + lane(), token, kWarp);
      unsigned kept_lanes[kItems], own = 0;
#pragma unroll
      for (int k = 0; k < kItems; ++k) {
        kept_lanes[k] = __ballot_sync(~0u, keeps(token[k], first + k * kWarp + lane()));
        own += __popc(kept_lanes[k]);
      }
      if (lane() == 0) held[warp()] = own;
      __syncthreads();
      const unsigned other = held[lane()], before = before_in_warp(other);
      int64_t place = kept + __shfl_sync(~0u, before, warp());
      kept += __shfl_sync(~0u, before + other, kWarp - 1);
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kItems; ++k) {
        const unsigned lanes = kept_lanes[k];
        if (lanes >> lane() & 1u) out[place + __popc(lanes & ((1u << lane()) - 1))] = first + k * kWarp + lane();
        place += __popc(lanes);
      }
    }
    if (part_ + 1 < a_.parts) return;
    for (int64_t k = kept + threadIdx.x; k < a_.total; k += kThreads) out[k] = -1;
    if (threadIdx.x == 0) a_.count[stream_] = kept;
  }

  const SelectArgs<T, kBudgets>& a_;
  const int64_t stream_;
  const int part_;
  const int64_t begin_, end_;  // positions of the part
  int pass_ = 0;
  const T* score_;
  const int64_t* segment_;
  Search<U> at_;
};

// a block a part
template <class T, int kBudgets>
__global__ void __launch_bounds__(kThreads, 1) select_kernel(const __grid_constant__ SelectArgs<T, kBudgets> a) {
  Block<T, kBudgets>(a, dynamic_shared<unsigned char>()).run();
}

}  // namespace vmemory::selection
