#include "common/attention.h"
#include "contracts/attention.h"
#include "torch/stable.h"

namespace vmemory {
namespace {

template <class T>
struct Saved {
  const T *grad, *query;
  const acc_t<T>*out, *stats;
};

// One head and some blocks of its keys: the weights are computed anew from the saved largest score and sum. Queries lie
// in the lanes where the sum runs over channels or keys, channels where it runs over queries.
template <class A>
class Head {
 public:
  Head(int64_t queries, int64_t E)
      : E_(E),
        wide_(padded_channels<A>(E)),
        lanes_(round_up(queries, kLanes<A>)),
        query_(lanes_ * wide_),
        grad_(lanes_ * wide_),
        query_rows_(lanes_ * wide_),
        grad_rows_(lanes_ * wide_),
        to_query_(lanes_ * wide_),
        keys_(kKeyBlock * wide_),
        values_(kKeyBlock * wide_),
        keys_by_channel_(kKeyBlock * wide_),
        to_keys_(kKeyBlock * wide_),
        to_values_(kKeyBlock * wide_),
        weight_(kKeyBlock * kProductVectors * kLanes<A>),
        slope_(kKeyBlock * kProductVectors * kLanes<A>),
        most_(lanes_),
        inverse_(lanes_),
        delta_(lanes_) {}

  template <class T>
  void start(const Rows<T>& query, const Rows<T>& grad, const Rows<A>& out, const A* most, const A* total,
             int64_t queries) {
    queries_ = queries;
    std::fill_n(to_query_.get(), lanes_ * wide_, A(0));
    std::fill_n(most_.get(), lanes_, A(0));
    std::fill_n(inverse_.get(), lanes_, A(0));
    std::fill_n(delta_.get(), lanes_, A(0));
    const A scale = A(1 / std::sqrt(double(E_)));
    for_query_tiles<A>(queries, [&](const QueryTile& t) {
      transpose_rows(query, t.first, t.count, t.width<A>(), scale, query_.get() + t.first * wide_);
      transpose_rows(grad, t.first, t.count, t.width<A>(), A(1), grad_.get() + t.first * wide_);
    });
    copy_rows(query, 0, queries, queries, wide_, query_rows_.get());
    copy_rows(grad, 0, queries, queries, wide_, grad_rows_.get());
    for (int64_t i = 0; i < queries; ++i) {
      most_.get()[i] = most[i];
      inverse_.get()[i] = A(1) / total[i];
      delta_.get()[i] = dot(out.row(i), grad.row(i), E_);
    }
  }

  // keys [first, first + count): their contribution to the queries' gradient, and their own gradient if required
  template <class T, class Q>
  void add_block(const Rows<Q>& keys, const Rows<Q>& values, int64_t first, int64_t count, T* to_keys, T* to_values) {
    const int64_t filled = tile_rows(count);
    copy_rows(keys, first, count, filled, wide_, keys_.get());
    copy_rows(values, first, count, filled, wide_, values_.get());
    interleave(keys_.get(), count, wide_, keys_by_channel_.get());
    std::fill_n(to_keys_.get(), filled * wide_, A(0));
    std::fill_n(to_values_.get(), filled * wide_, A(0));
    for_query_tiles<A>(queries_, [&](const QueryTile& t) {
      slopes(t, count);
      if (to_keys != nullptr) {
        add_rows(t, filled, slope_.get(), query_rows_.get(), to_keys_.get());
        add_rows(t, filled, weight_.get(), grad_rows_.get(), to_values_.get());
      }
      const int64_t width = t.width<A>();
      A* to = to_query_.get() + t.first * wide_;
      for (int64_t e = 0; e < wide_; e += kProductRows)
        product_tile<true, true>(t.vectors, keys_by_channel_.get() + e * count, 0, slope_.get(), width, count,
                                 to + e * width, width);
    });
    if (to_keys == nullptr) return;
    for (int64_t j = 0; j < count; ++j)
      for_channels<A>(E_, [&](int64_t d, int64_t lanes) {
        const int64_t at = (first + j) * keys.step + d;
        store_some(to_keys + at, load(to_keys_.get() + j * wide_ + d), lanes);
        store_some(to_values + at, load(to_values_.get() + j * wide_ + d), lanes);
      });
  }

  void finish(A* to, int64_t step) const {
    for_query_tiles<A>(queries_, [&](const QueryTile& t) {
      for (int64_t i = 0; i < t.count; ++i)
        for (int64_t e = 0; e < E_; ++e)
          to[(t.first + i) * step + e] = to_query_.get()[t.first * wide_ + e * t.width<A>() + i];
    });
  }

 private:
  // the weights, and the gradients of the scores times the scale
  void slopes(const QueryTile& t, int64_t count) {
    constexpr int64_t L = kLanes<A>;
    const int64_t width = t.width<A>();
    const A scale = A(1 / std::sqrt(double(E_)));
    score_tile(keys_.get(), count, wide_, query_.get() + t.first * wide_, E_, t, weight_.get());
    score_tile(values_.get(), count, wide_, grad_.get() + t.first * wide_, E_, t, slope_.get());
    for (int64_t w = 0; w < t.vectors; ++w) {
      const vec<A> most = load(most_.get() + t.first + w * L), inverse = load(inverse_.get() + t.first + w * L);
      const vec<A> delta = load(delta_.get() + t.first + w * L);
      for (int64_t j = 0; j < count; ++j) {
        const int64_t at = j * width + w * L;
        const vec<A> p = exp<A>(load(weight_.get() + at) - most) * inverse;
        store(weight_.get() + at, p);
        store(slope_.get() + at, p * (load(slope_.get() + at) - delta) * scale);
      }
    }
  }

  // to[key][channel] += sum over the tile's queries of factor[key][query] rows[query][channel]
  void add_rows(const QueryTile& t, int64_t filled, const A* factor, const A* rows, A* to) const {
    constexpr int64_t L = kLanes<A>;
    for_vector_tiles((E_ + L - 1) / L, [&](int64_t vector, int64_t vectors) {
      for (int64_t j = 0; j < filled; j += kProductRows)
        product_tile<true, false>(vectors, factor + j * t.width<A>(), t.width<A>(), rows + t.first * wide_ + vector * L,
                                  wide_, t.count, to + j * wide_ + vector * L, wide_);
    });
  }

  int64_t E_, wide_, lanes_, queries_ = 0;
  Lines<A> query_, grad_, query_rows_, grad_rows_, to_query_;
  Lines<A> keys_, values_, keys_by_channel_, to_keys_, to_values_, weight_, slope_, most_, inverse_, delta_;
};

// slots that are not valid get no gradient
template <class T>
void clear_invalid(const SlotSizes& z, const int64_t* count, T* out) {
  const int64_t row = z.G * z.E;
  parallel_bytes(z.S, z.S * z.rows() * row * sizeof(T), [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const int64_t valid = z.valid(count, s);
      T* from = out + (s * z.rows() + valid) * row;
      std::fill_n(reinterpret_cast<char*>(from), (z.rows() - valid) * row * sizeof(T), 0);
    }
  });
}

// `partial` [pieces, S, N, G, E]: the contribution of each piece of the keys to the queries' gradient
template <class T, class Q>
void backward(const SlotSizes& z, const Saved<T>& x, const Slots<Q>& slots, const int64_t* count, int64_t pieces,
              acc_t<T>* partial, T* to_keys, T* to_values) {
  using A = acc_t<T>;
  parallel(z.S * z.G * pieces, kSmallAttention / (z.N * (z.rows() / pieces + 1) * (z.E + 1) + 1),
           [&](int64_t begin, int64_t end) {
             Head<A> head(z.N, z.E);
             for (int64_t item = begin; item < end; ++item) {
               const int64_t p = item % pieces, g = item / pieces % z.G, s = item / pieces / z.G;
               const auto rows = [&](auto* from) { return head_rows(from, nullptr, s, z.N, z.G, g, z.E); };
               const Rows<Q> keys = slots.head_keys(z, s, g), values = slots.head_values(z, s, g);
               const int64_t valid = z.valid(count, s), blocks = (valid + kKeyBlock - 1) / kKeyBlock;
               head.start(rows(x.query), rows(x.grad), rows(x.out), x.stats + (s * z.G + g) * z.N,
                          x.stats + (z.S * z.G + s * z.G + g) * z.N, z.N);
               const int64_t at = (s * z.rows() * z.G + g) * z.E;
               for (int64_t b = p * blocks / pieces; b < (p + 1) * blocks / pieces; ++b)
                 head.add_block(keys, values, b * kKeyBlock, std::min(kKeyBlock, valid - b * kKeyBlock),
                                to_keys ? to_keys + at : nullptr, to_keys ? to_values + at : nullptr);
               head.finish(partial + ((p * z.S + s) * z.N * z.G + g) * z.E, z.G * z.E);
             }
           });
}

template <class T>
void add_pieces(int64_t n, int64_t pieces, const acc_t<T>* partial, T* out) {
  using A = acc_t<T>;
  parallel(n, 1 << 16, [&](int64_t begin, int64_t end) {
    for_channels<A>(end - begin, [&](int64_t i, int64_t lanes) {
      vec<A> sum{};
      for (int64_t p = 0; p < pieces; ++p) sum += load_some(partial + p * n + begin + i, lanes);
      store_some(out + begin + i, sum, lanes);
    });
  });
}

std::tuple<Tensor, Tensor, Tensor> memory_attention_backward(const Tensor& grad_, const Tensor& query_,
                                                             const Tensor& keys_, const Tensor& values_,
                                                             const Tensor& count_, std::optional<Tensor> key_scale_,
                                                             std::optional<Tensor> value_scale_, const Tensor& out_,
                                                             const Tensor& stats_, bool for_memory) {
  contract::memory_attention_backward(grad_, query_, keys_, values_, count_, key_scale_, value_scale_, out_, stats_,
                                      for_memory);
  const Tensor grad = dense(grad_), query = dense(query_), keys = dense(keys_), values = dense(values_);
  const Tensor count = dense(count_), out = dense(out_), stats = dense(stats_);
  const Tensor key_scale = key_scale_ ? dense(*key_scale_) : count;
  const Tensor value_scale = value_scale_ ? dense(*value_scale_) : count;
  const SlotSizes z{query.size(0), query.size(1), query.size(2), query.size(3), keys.size(1), keys.size(2)};
  const int64_t pieces = pieces_of(z.S * z.G, z.rows() / kKeyBlock, 1, torch::stable::get_num_threads());
  Tensor to_query = make(query, {z.S, z.N, z.G, z.E});
  Tensor to_keys = make(query, for_memory ? Ints{z.S, z.M, z.n, z.G, z.E} : Ints{0});
  Tensor to_values = make(query, for_memory ? Ints{z.S, z.M, z.n, z.G, z.E} : Ints{0});
  Tensor partial = make(query, {pieces, z.S, z.N, z.G, z.E}, stats.scalar_type());
  dispatch_floating(query.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    using A = acc_t<T>;
    const int64_t* counts = data<int64_t>(count);
    if (for_memory) {
      clear_invalid(z, counts, mutable_data<T>(to_keys));
      clear_invalid(z, counts, mutable_data<T>(to_values));
    }
    const Saved<T> saved{data<T>(grad), data<T>(query), data<A>(out), data<A>(stats)};
    dispatch_stored<T>(keys.scalar_type(), [&](auto q) {
      using Q = typename decltype(q)::type;
      const Slots<Q> slots{data<Q>(keys), data<Q>(values), key_scale_ ? data<float>(key_scale) : nullptr,
                           value_scale_ ? data<float>(value_scale) : nullptr};
      backward(z, saved, slots, counts, pieces, mutable_data<A>(partial),
               for_memory ? mutable_data<T>(to_keys) : nullptr, for_memory ? mutable_data<T>(to_values) : nullptr);
    });
    add_pieces(query.numel(), pieces, data<A>(partial), mutable_data<T>(to_query));
  });
  return {to_query, to_keys, to_values};
}

}  // namespace
}  // namespace vmemory

STABLE_TORCH_LIBRARY_IMPL(vmemory, CPU, m) {
  m.impl("memory_attention_backward", TORCH_BOX(&vmemory::memory_attention_backward));
}
