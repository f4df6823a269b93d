#include "common/attention_of_few.h"
#include "contracts/attention.h"
#include "torch/products.h"

namespace vmemory {
namespace {

// Online softmax over blocks of keys for one piece of queries of one head. Scores and outputs lie transposed, queries
// in the lanes: no sum runs across a vector.
template <class A>
class Piece {
 public:
  Piece(int64_t queries, int64_t E)
      : E_(E),
        wide_(padded_channels<A>(E)),
        lanes_(round_up(queries, kLanes<A>)),
        query_(lanes_ * wide_),
        out_(lanes_ * wide_),
        keys_(kKeyBlock * wide_),
        values_(kKeyBlock * wide_),
        weight_(kKeyBlock * kProductVectors * kLanes<A>),
        most_(lanes_),
        total_(lanes_) {}

  template <class T, class Q>
  void attend(const Rows<T>& query, int64_t first, int64_t queries, const Rows<Q>& keys, const Rows<Q>& values,
              int64_t valid) {
    std::fill_n(out_.get(), lanes_ * wide_, A(0));
    std::fill_n(most_.get(), lanes_, -std::numeric_limits<A>::infinity());
    std::fill_n(total_.get(), lanes_, A(0));
    const A scale = A(1 / std::sqrt(double(E_)));
    for_query_tiles<A>(queries, [&](const QueryTile& t) {
      transpose_rows(query, first + t.first, t.count, t.width<A>(), scale, query_.get() + t.first * wide_);
    });
    for (int64_t j = 0; j < valid; j += kKeyBlock) {
      const int64_t count = std::min(kKeyBlock, valid - j);
      copy_rows(values, j, count, count, wide_, keys_.get());
      interleave(keys_.get(), count, wide_, values_.get());
      copy_rows(keys, j, count, tile_rows(count), wide_, keys_.get());
      for_query_tiles<A>(queries, [&](const QueryTile& t) { add_block(t, count); });
    }
  }

  // outputs, and the largest score and the sum, from which the backward pass computes the weights
  template <class T>
  void write(int64_t queries, int64_t valid, T* out, int64_t step, A* largest, A* sum) const {
    Lines<A> row(wide_);
    for_query_tiles<A>(queries, [&](const QueryTile& t) {
      const int64_t width = t.width<A>();
      for (int64_t i = 0; i < t.count; ++i) {
        const A total = total_.get()[t.first + i], most = most_.get()[t.first + i];
        const A* from = out_.get() + t.first * wide_ + i;
        for (int64_t e = 0; e < E_; ++e) row.get()[e] = valid ? from[e * width] / total : A(0);
        T* to = out + (t.first + i) * step;
        for_channels<A>(E_, [&](int64_t d, int64_t lanes) { store_some(to + d, load(row.get() + d), lanes); });
        largest[t.first + i] = most > -std::numeric_limits<A>::infinity() ? most : A(0);
        sum[t.first + i] = total;
      }
    });
  }

 private:
  void add_block(const QueryTile& t, int64_t count) {
    constexpr int64_t L = kLanes<A>;
    const int64_t width = t.width<A>();
    A* out = out_.get() + t.first * wide_;
    score_tile(keys_.get(), count, wide_, query_.get() + t.first * wide_, E_, t, weight_.get());
    for (int64_t w = 0; w < t.vectors; ++w) {
      A* p = weight_.get() + w * L;
      A* most = most_.get() + t.first + w * L;
      A* total = total_.get() + t.first + w * L;
      const vec<A> before = load(most);
      vec<A> largest = before;
      for (int64_t j = 0; j < count; ++j) largest = vmax<A>(load(p + j * width), largest);
      // -inf - (-inf) would be NaN for a query whose scores so far are all -inf
      const vec<A> base = largest > -std::numeric_limits<A>::infinity() ? largest : vec<A>{};
      const vec<A> shrink = exp<A>(before - base);
      vec<A> sum[4] = {};
      for (int64_t j = 0; j < count; ++j) {
        const vec<A> x = exp<A>(load(p + j * width) - base);
        store(p + j * width, x);
        sum[j % 4] += x;
      }
      store(total, load(total) * shrink + ((sum[0] + sum[1]) + (sum[2] + sum[3])));
      store(most, largest);
      for (int64_t e = 0; e < wide_; ++e) store(out + e * width + w * L, load(out + e * width + w * L) * shrink);
    }
    for (int64_t e = 0; e < wide_; e += kProductRows)
      product_tile<true, true>(t.vectors, values_.get() + e * count, 0, weight_.get(), width, count, out + e * width,
                               width);
  }

  int64_t E_, wide_, lanes_;
  Lines<A> query_, out_, keys_, values_, weight_, most_, total_;
};

// the output, rounded or, for the backward pass, as accumulated; the other pointer is null
template <class T>
struct Out {
  T* rounded;
  acc_t<T>* wide;
  template <class F>
  void at(int64_t first, const F& f) const {
    wide ? f(wide + first) : f(rounded + first);
  }
};

template <class T, class Q>
void attention(const SlotSizes& z, const T* query, const Slots<Q>& slots, const int64_t* count, const Out<T>& out,
               acc_t<T>* stats) {
  using A = acc_t<T>;
  const int64_t vectors = (z.N + kLanes<A> - 1) / kLanes<A>;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t pieces = pieces_of(z.S * z.G, vectors, kProductVectors, threads);
  int64_t longest = 0;
  for (int64_t s = 0; s < z.S; ++s) longest = std::max(longest, z.valid(count, s));
  const int64_t work = z.N * (longest + 1) * (z.E + 1) / pieces + 1;
  parallel(z.S * z.G * pieces, kSmallAttention / work, [&](int64_t begin, int64_t end) {
    Piece<A> piece((vectors + pieces - 1) / pieces * kLanes<A>, z.E);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t p = item % pieces, g = item / pieces % z.G, s = item / pieces / z.G;
      const int64_t first = p * vectors / pieces * kLanes<A>;
      const int64_t queries = std::min((p + 1) * vectors / pieces * kLanes<A>, z.N) - first;
      const int64_t valid = z.valid(count, s);
      piece.attend(head_rows(query, nullptr, s, z.N, z.G, g, z.E), first, queries, slots.head_keys(z, s, g),
                   slots.head_values(z, s, g), valid);
      out.at(((s * z.N + first) * z.G + g) * z.E, [&](auto* to) {
        piece.write(queries, valid, to, z.G * z.E, stats + (s * z.G + g) * z.N + first,
                    stats + (z.S * z.G + s * z.G + g) * z.N + first);
      });
    }
  });
}

template <class T, class Q>
void attention_of_few(const SlotSizes& z, const T* query, const Slots<Q>& slots, const int64_t* count,
                      const Out<T>& out, acc_t<T>* stats) {
  using A = acc_t<T>;
  int64_t longest = 0;
  for (int64_t s = 0; s < z.S; ++s) longest = std::max(longest, z.valid(count, s));
  const int64_t work = (z.N + 1) * (longest + 1) * (z.E + 1);
  parallel(z.S * z.G, kSmallAttention / work, [&](int64_t begin, int64_t end) {
    FewQueries<A> few(std::min(end - begin, z.G), z.N, z.E);
    for (int64_t item = begin; item < end;) {
      const int64_t s = item / z.G, first = item % z.G, heads = std::min(end - item, z.G - first);
      const int64_t valid = z.valid(count, s);
      few.attend(z, query, slots, s, first, heads, valid);
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t g = first + h;
        out.at((s * z.N * z.G + g) * z.E, [&](auto* to) {
          few.write(h, valid, to, z.G * z.E, stats + (s * z.G + g) * z.N, stats + (z.S * z.G + s * z.G + g) * z.N);
        });
      }
      item += heads;
    }
  });
}

// Attention of one stream to its valid rows by torch's own kernel, which multiplies 16-bit tiles where there is AMX.
void attend_by_library(const SlotSizes& z, const Tensor& query, const Tensor& keys, const Tensor& values,
                       const int64_t* count, const Tensor& out, const Tensor& stats) {
  float* largest = mutable_data<float>(stats);
  std::fill(largest + z.S * z.G * z.N, largest + 2 * z.S * z.G * z.N, 1.f);
  const auto heads_first = [](const Tensor& t) { return torch::stable::transpose(t, 1, 2); };
  for (int64_t s = 0; s < z.S; ++s, largest += z.G * z.N) {
    const auto stream = [&](const Tensor& t) {
      Tensor all = t;
      return torch::stable::narrow(all, 0, s, 1);
    };
    const int64_t valid = z.valid(count, s);
    Tensor to = heads_first(stream(out));
    if (valid == 0) {
      torch::stable::zero_(to);
      std::fill(largest, largest + z.G * z.N, 0.f);
      continue;
    }
    const auto rows = [&](const Tensor& t) {
      Tensor all = torch::stable::flatten(stream(t), 1, 2);
      return heads_first(torch::stable::narrow(all, 1, 0, valid));
    };
    using torch::stable::detail::from;
    std::array<StableIValue, 7> stack{from(heads_first(stream(query))),
                                      from(rows(keys)),
                                      from(rows(values)),
                                      from(0.0),
                                      from(false),
                                      from(std::optional<Tensor>()),
                                      from(std::optional<double>())};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::_scaled_dot_product_flash_attention_for_cpu", "", stack.data(),
                                                 TORCH_ABI_VERSION));
    torch::stable::copy_(to, torch::stable::detail::to<Tensor>(stack[0]));
    const Tensor sums = dense(torch::stable::detail::to<Tensor>(stack[1]));
    std::copy_n(data<float>(sums), z.G * z.N, largest);
  }
}

std::tuple<Tensor, Tensor> memory_attention(const Tensor& query_, const Tensor& keys_, const Tensor& values_,
                                            const Tensor& count_, std::optional<Tensor> key_scale_,
                                            std::optional<Tensor> value_scale_, bool wide) {
  contract::memory_attention(query_, keys_, values_, count_, key_scale_, value_scale_);
  const Tensor query = dense(query_), keys = dense(keys_), values = dense(values_), count = dense(count_);
  const Tensor key_scale = key_scale_ ? dense(*key_scale_) : count;
  const Tensor value_scale = value_scale_ ? dense(*value_scale_) : count;
  const SlotSizes z{query.size(0), query.size(1), query.size(2), query.size(3), keys.size(1), keys.size(2)};
  const ScalarType stored = query.scalar_type();
  const ScalarType accumulated = stored == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor out = make(query, {z.S, z.N, z.G, z.E}, wide ? accumulated : stored);
  Tensor stats = make(query, {2, z.S, z.G, z.N}, accumulated);
  if (stats.numel() == 0) return {out, stats};
  if (stored == ScalarType::BFloat16 && keys.scalar_type() == stored && z.E > 0 && has_amx()) {
    attend_by_library(z, query, keys, values, data<int64_t>(count), out, stats);
    return {out, stats};
  }
  dispatch_floating(stored, [&](auto t) {
    using T = typename decltype(t)::type;
    using A = acc_t<T>;
    const Out<T> to{wide ? nullptr : mutable_data<T>(out), wide ? mutable_data<A>(out) : nullptr};
    dispatch_stored<T>(keys.scalar_type(), [&](auto q) {
      using Q = typename decltype(q)::type;
      const Slots<Q> slots{data<Q>(keys), data<Q>(values), key_scale_ ? data<float>(key_scale) : nullptr,
                           value_scale_ ? data<float>(value_scale) : nullptr};
      const auto run = z.N <= kFewQueries ? attention_of_few<T, Q> : attention<T, Q>;
      run(z, data<T>(query), slots, data<int64_t>(count), to, mutable_data<A>(stats));
    });
  });
  return {out, stats};
}

}  // namespace
}  // namespace vmemory

STABLE_TORCH_LIBRARY_IMPL(vmemory, CPU, m) { m.impl("memory_attention", TORCH_BOX(&vmemory::memory_attention)); }
