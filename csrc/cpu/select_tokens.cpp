#include "contracts/select_tokens.h"

#include "common/move_rows.h"
#include "common/rows.h"
#include "common/select.h"
#include "torch/stable.h"

namespace vmemory {
namespace {

constexpr int64_t kChunk = 1 << 15;       // keys of a row that one thread takes at a time
constexpr int64_t kGrainBytes = 1 << 17;  // below this a second thread costs more than it saves

// one row without segments, in chunks: the chunks are the same whatever the
// number of threads
template <class T>
class Row {
  using U = key_t<T>;

 public:
  explicit Row(int64_t n) : n_(n), chunks_((n + kChunk - 1) / kChunk), key_(n), part_(chunks_) {}

  int64_t select(const T* score, int64_t budget, int64_t* out, bool threads) {
    const auto each = [&](const auto& f) {
      const auto body = [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c) f(part_[c], c * kChunk, std::min(kChunk, n_ - c * kChunk));
      };
      threads ? parallel(chunks_, 1, body) : body(0, chunks_);
    };
    each([&](Part& part, int64_t first, int64_t n) {
      make_keys(score + first, n, key_.data() + first);
      part.histogram.clear();
      part.histogram.add(key_.data() + first, n);
    });
    const Cut<U> cut = find_cut(std::min(budget, n_), each);
    each([&](Part& part, int64_t first, int64_t n) {
      part.above = part.ties = 0;
      const U* key = key_.data() + first;
      for (int64_t i = 0; i < n; ++i) part.above += key[i] > cut.key, part.ties += key[i] == cut.key;
    });
    int64_t place = 0, ties = cut.ties;
    for (Part& part : part_) {
      part.ties = std::min(part.ties, ties);
      part.place = place;
      place += part.above + part.ties;
      ties -= part.ties;
    }
    each([&](Part& part, int64_t first, int64_t n) {
      int64_t* to = out + part.place;
      each_kept(key_.data() + first, n, Cut<U>{cut.key, part.ties}, [&](int64_t i) { *to++ = first + i; });
    });
    return place;
  }

 private:
  struct Part {
    Histogram<U> histogram;
    std::vector<U> candidate;
    int64_t above, ties, place;
  };

  // counting would take longer than the search
  bool small() const { return n_ <= kRadix; }

  template <class Each>
  Cut<U> find_cut(int64_t budget, const Each& each) {
    if (budget >= n_) return Cut<U>::all();
    if (budget <= 0) return Cut<U>::none();
    if (small()) {
      std::vector<U> among = key_;
      return cut_among(among.data(), n_, budget);
    }
    int64_t rank = budget;
    int digit = kRadix;
    for (int64_t held = 0; rank > held;) {
      rank -= held;
      held = 0;
      --digit;
      for (const Part& part : part_) held += part.histogram.count(digit);
    }
    each([&](Part& part, int64_t first, int64_t n) {
      // one more element, because every key is written and only keys with the digit advance the position
      part.candidate.resize(part.histogram.count(digit) + 1);
      U* to = part.candidate.data();
      for (int64_t i = first; i < first + n; ++i) {
        *to = key_[i];
        to += Histogram<U>::digit(key_[i]) == digit;
      }
    });
    std::vector<U> among;
    for (const Part& part : part_) among.insert(among.end(), part.candidate.begin(), part.candidate.end() - 1);
    return cut_among(among.data(), static_cast<int64_t>(among.size()), rank);
  }

  int64_t n_, chunks_;
  std::vector<U> key_;
  std::vector<Part> part_;
};

std::tuple<Tensor, Tensor> select_tokens(const Tensor& scores_, Ints budgets, std::optional<Tensor> segments_) {
  contract::select_tokens(scores_, budgets, segments_);
  const Tensor scores = dense(scores_), segments = segments_ ? dense(*segments_) : scores;
  const int64_t S = scores.size(0), N = scores.size(1);
  int64_t total = 0;
  for (const int64_t budget : budgets) total += budget;
  Tensor index = make(scores, {S, total}, ScalarType::Long), count = make(scores, {S}, ScalarType::Long);
  // a row of ids for all streams, or one each
  const int64_t step = segments_ && segments.dim() == 2 ? N : 0;
  dispatch_floating(scores.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    const T* score = data<T>(scores);
    int64_t *to = mutable_data<int64_t>(index), *held = mutable_data<int64_t>(count);
    const auto finish = [&](int64_t s, int64_t n) {
      held[s] = n;
      std::fill(to + s * total + n, to + (s + 1) * total, int64_t(-1));
    };
    if (!segments_ && S < torch::stable::get_num_threads() && N > kChunk) {
      Row<T> row(N);
      for (int64_t s = 0; s < S; ++s) finish(s, row.select(score + s * N, total, to + s * total, true));
      return;
    }
    parallel(S, kGrainBytes / (N * sizeof(T) + 1), [&](int64_t begin, int64_t end) {
      if (segments_) {
        SegmentedRow<T> row(N, budgets);
        for (int64_t s = begin; s < end; ++s)
          finish(s, row.select(score + s * N, data<int64_t>(segments) + s * step, to + s * total));
      } else {
        Row<T> row(N);
        for (int64_t s = begin; s < end; ++s) finish(s, row.select(score + s * N, total, to + s * total, false));
      }
    });
  });
  return {index, count};
}

// -1 in a type, repeated to eight bytes
uint64_t minus_one(ScalarType type) {
  uint64_t bits = ~uint64_t(0);
  if (type == ScalarType::Double) bits = 0xbff0000000000000u;
  if (type == ScalarType::Float) bits = 0xbf800000bf800000u;
  if (type == ScalarType::Half) bits = 0xbc00bc00bc00bc00u;
  if (type == ScalarType::BFloat16) bits = 0xbf80bf80bf80bf80u;
  return bits;
}

int64_t row_size(const Tensor& x) {
  int64_t n = 1;
  for (int64_t d = 2; d < x.dim(); ++d) n *= x.size(d);
  return n;
}

std::vector<Tensor> compact(std::vector<Tensor> rows, const Tensor& keep_) {
  contract::compact(rows, keep_);
  const Tensor keep = dense(keep_);
  const int64_t S = keep.size(0), K = keep.size(1);
  std::vector<Tensor> in, out;
  std::vector<Rows> moves;
  int64_t total = 1;
  for (const Tensor& x : rows) {
    in.push_back(dense(x));
    Ints sizes{S, K};
    for (int64_t d = 2; d < x.dim(); ++d) sizes.push_back(x.size(d));
    out.push_back(make(x, sizes));
    const bool ones = out.size() > 1 && x.scalar_type() != ScalarType::Bool;
    moves.push_back({data<char>(in.back()), mutable_data<char>(out.back()),
                     row_size(x) * static_cast<int64_t>(x.element_size()), x.size(1), K,
                     ones ? minus_one(x.scalar_type()) : 0});
    total += moves.back().bytes;
  }
  const int64_t* from = data<int64_t>(keep);
  parallel(S * K, kGrainBytes / total, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end;) {
      const int64_t s = at / K, first = at % K, last = std::min(K, first + end - at);
      for (const Rows& move : moves) move.move(from + s * K, s, first, last);
      at += last - first;
    }
  });
  return out;
}

Tensor compact_backward(const Tensor& grad_, const Tensor& keep_, int64_t N) {
  contract::compact_backward(grad_, keep_, N);
  const Tensor grad = dense(grad_), keep = dense(keep_);
  const int64_t S = keep.size(0), K = keep.size(1), D = row_size(grad);
  Ints sizes{S, N};
  for (int64_t d = 2; d < grad.dim(); ++d) sizes.push_back(grad.size(d));
  Tensor out = make(grad, sizes);
  if (out.numel() == 0) return out;
  dispatch_floating(grad.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    using A = acc_t<T>;
    for (int64_t s = 0; s < S; ++s) {
      const Inverse inverse(data<int64_t>(keep) + s * K, K, N);
      const T* from = data<T>(grad) + s * K * D;
      T* to = mutable_data<T>(out) + s * N * D;
      parallel(N, kGrainBytes / (D * sizeof(T) + 1), [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n) {
          const int64_t *place = inverse.places.data() + inverse.first[n],
                        times = inverse.first[n + 1] - inverse.first[n];
          if (times == 0) {
            std::memset(static_cast<void*>(to + n * D), 0, D * sizeof(T));
          } else if (times == 1) {
            std::memcpy(static_cast<void*>(to + n * D), from + *place * D, D * sizeof(T));
          } else {
            for_channels<A>(D, [&](int64_t d, int64_t lanes) {
              vec<A> sum{};
              for (int64_t k = 0; k < times; ++k) sum += load_some(from + place[k] * D + d, lanes);
              store_some(to + n * D + d, sum, lanes);
            });
          }
        }
      });
    }
  });
  return out;
}

}  // namespace
}  // namespace vmemory

STABLE_TORCH_LIBRARY_IMPL(vmemory, CPU, m) {
  m.impl("select_tokens", TORCH_BOX(&vmemory::select_tokens));
  m.impl("compact", TORCH_BOX(&vmemory::compact));
  m.impl("compact_backward", TORCH_BOX(&vmemory::compact_backward));
}
