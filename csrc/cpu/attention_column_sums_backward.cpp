#include "common/column_sums.h"
#include "contracts/attention.h"
#include "torch/stable.h"

namespace vmemory {
namespace {

// With w the gradient of a column and d the mean of w under a query's weights p, a score's gradient is p (w - d):
// scores become these, times the scale.
template <class A>
void into_slopes(const ScoreBlocks<A>& blocks, const QueryStats<A>& stats, const QueryTile& t, const A* grad, A scale) {
  constexpr int64_t L = kLanes<A>;
  for (int64_t j = 0; j < blocks.keys_taken(); ++j) {
    const int64_t key = blocks.first_key() + j;
    for (int64_t w = 0; w < t.vectors; ++w) {
      A* at = blocks.score(t, j, w);
      const vec<A> along = grad[key] - load(stats.delta.get() + t.first + w * L);
      store(at, stats.where_seen(t, w, key, stats.weights(t, w, at) * along * scale));
    }
  }
}

// One piece of the queries of one head: the means d, then the gradient of the queries.
template <class T, class A>
void into_queries(const MapSizes& z, const Rows<T>& query, const Rows<T>& keys, const A* grad, const A* largest,
                  const A* sum, int64_t first, int64_t count, A* delta, T* out) {
  constexpr int64_t L = kLanes<A>;
  ScoreBlocks<A> blocks(z, count);
  blocks.take_queries(query, first, count);
  QueryStats<A> stats(blocks.lanes());
  stats.take(z, largest, sum, first, count, blocks.lanes());
  const int64_t wide = blocks.wide(), seen = z.seen(first + count - 1);
  Lines<A> mean(blocks.lanes()), by_channel(kKeyBlock * wide), total(blocks.lanes() * wide), row(wide);
  std::fill_n(mean.get(), blocks.lanes(), A(0));
  std::fill_n(total.get(), blocks.lanes() * wide, A(0));
  const auto for_blocks = [&](const auto& f) {
    for (int64_t k = 0; k < seen; k += kKeyBlock) {
      blocks.take_keys(keys, k, std::min(kKeyBlock, seen - k));
      f(k, blocks.keys_taken());
    }
  };
  for_blocks([&](int64_t k, int64_t n) {
    blocks.for_tiles([&](const QueryTile& t) {
      for (int64_t w = 0; w < t.vectors; ++w) {
        vec<A> sums[4] = {};
        for (int64_t j = 0; j < n; ++j)
          sums[j % 4] += stats.where_seen(t, w, k + j, stats.weights(t, w, blocks.score(t, j, w)) * grad[k + j]);
        A* to = mean.get() + t.first + w * L;
        store(to, load(to) + ((sums[0] + sums[1]) + (sums[2] + sums[3])));
      }
    });
  });
  std::copy_n(mean.get(), count, delta + first);
  std::copy_n(mean.get(), blocks.lanes(), stats.delta.get());
  const A scale = A(1 / std::sqrt(double(z.E)));
  for_blocks([&](int64_t, int64_t n) {
    interleave(blocks.keys(), n, wide, by_channel.get());
    blocks.for_tiles([&](const QueryTile& t) {
      into_slopes(blocks, stats, t, grad, scale);
      const int64_t width = t.width<A>();
      A* to = total.get() + t.first * wide;
      for (int64_t e = 0; e < wide; e += kProductRows)
        product_tile<true, true>(t.vectors, by_channel.get() + e * n, 0, blocks.score(t, 0, 0), width, n,
                                 to + e * width, width);
    });
  });
  for_query_tiles<A>(count, [&](const QueryTile& t) {
    for (int64_t i = 0; i < t.count; ++i) {
      for (int64_t e = 0; e < z.E; ++e) row.get()[e] = total.get()[t.first * wide + e * t.width<A>() + i];
      T* to = out + (first + t.first + i) * query.step;
      for_channels<A>(z.E, [&](int64_t d, int64_t lanes) { store_some(to + d, load(row.get() + d), lanes); });
    }
  });
}

// the gradients of the keys [begin, end) of one head; `rows` are its queries, as read
template <class T, class A>
void into_keys(const MapSizes& z, ScoreBlocks<A>& blocks, const QueryStats<A>& stats, const A* rows,
               const Rows<T>& keys, const A* grad, int64_t begin, int64_t end, T* out) {
  constexpr int64_t L = kLanes<A>;
  const int64_t wide = blocks.wide();
  const A scale = A(1 / std::sqrt(double(z.E)));
  Lines<A> total(kKeyBlock * wide);
  for (int64_t k = begin; k < end; k += kKeyBlock) {
    const int64_t n = std::min(kKeyBlock, end - k), filled = tile_rows(n);
    blocks.take_keys(keys, k, n);
    std::fill_n(total.get(), filled * wide, A(0));
    blocks.for_tiles([&](const QueryTile& t) {
      into_slopes(blocks, stats, t, grad, scale);
      for_vector_tiles((z.E + L - 1) / L, [&](int64_t vector, int64_t vectors) {
        for (int64_t j = 0; j < filled; j += kProductRows)
          product_tile<true, false>(vectors, blocks.score(t, j, 0), t.width<A>(), rows + t.first * wide + vector * L,
                                    wide, t.count, total.get() + j * wide + vector * L, wide);
      });
    });
    for (int64_t j = 0; j < n; ++j)
      for_channels<A>(z.E, [&](int64_t d, int64_t lanes) {
        store_some(out + (k + j) * keys.step + d, load(total.get() + j * wide + d), lanes);
      });
  }
}

template <class T>
void backward(const MapSizes& z, const acc_t<T>* grad, const T* query, const T* key, const acc_t<T>* stats,
              acc_t<T>* delta, T* to_query, T* to_key) {
  using A = acc_t<T>;
  const int64_t heads = z.S * z.G, vectors = (z.N + kLanes<A> - 1) / kLanes<A>;
  const int64_t threads = torch::stable::get_num_threads();
  const auto rows = [&](const T* x, int64_t n, int64_t head) {
    return head_rows(x, nullptr, head / z.G, n, z.G, head % z.G, z.E);
  };
  const auto at = [&](int64_t head, int64_t n) { return (head / z.G * n * z.G + head % z.G) * z.E; };
  const int64_t work = z.N * (z.M + 1) * (z.E + 1) + 1,
                row_pieces = pieces_of(heads, vectors, kProductVectors, threads);
  parallel(heads * row_pieces, kSmallAttention / (work / row_pieces + 1), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t p = item % row_pieces, head = item / row_pieces;
      const int64_t first = p * vectors / row_pieces * kLanes<A>;
      const int64_t count = std::min((p + 1) * vectors / row_pieces * kLanes<A>, z.N) - first;
      into_queries(z, rows(query, z.N, head), rows(key, z.M, head), grad + head * z.M, stats + head * z.N,
                   stats + (heads + head) * z.N, first, count, delta + head * z.N, to_query + at(head, z.N));
    }
  });
  const int64_t key_blocks = (z.M + kKeyBlock - 1) / kKeyBlock, pieces = pieces_of(heads, key_blocks, 1, threads);
  parallel(heads * pieces, kSmallAttention / (work / pieces + 1), [&](int64_t begin, int64_t end) {
    ScoreBlocks<A> blocks(z, z.N);
    QueryStats<A> of(blocks.lanes());
    Lines<A> plain(blocks.lanes() * blocks.wide());
    for (int64_t item = begin; item < end; ++item) {
      const int64_t p = item % pieces, head = item / pieces;
      if (item == begin || p == 0) {
        blocks.take_queries(rows(query, z.N, head), 0, z.N);
        of.take(z, stats + head * z.N, stats + (heads + head) * z.N, 0, z.N, blocks.lanes());
        std::copy_n(delta + head * z.N, z.N, of.delta.get());
        copy_rows(rows(query, z.N, head), 0, z.N, z.N, blocks.wide(), plain.get());
      }
      into_keys(z, blocks, of, plain.get(), rows(key, z.M, head), grad + head * z.M,
                p * key_blocks / pieces * kKeyBlock, std::min((p + 1) * key_blocks / pieces * kKeyBlock, z.M),
                to_key + at(head, z.M));
    }
  });
}

std::tuple<Tensor, Tensor> attention_column_sums_backward(const Tensor& grad_, const Tensor& query_, const Tensor& key_,
                                                          const Tensor& stats_, bool causal) {
  contract::attention_column_sums_backward(grad_, query_, key_, stats_);
  const Tensor grad = dense(grad_), query = dense(query_), key = dense(key_), stats = dense(stats_);
  const MapSizes z{query.size(0), query.size(1), query.size(2), query.size(3), key.size(1), causal};
  Tensor to_query = make(query, {z.S, z.N, z.G, z.E}), to_key = make(query, {z.S, z.M, z.G, z.E});
  const Tensor delta = make(query, {z.S, z.G, z.N}, stats.scalar_type());
  dispatch_floating(query.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    using A = acc_t<T>;
    if (delta.numel() == 0) {
      std::fill_n(reinterpret_cast<char*>(mutable_data<T>(to_key)), to_key.numel() * sizeof(T), 0);
      return;
    }
    backward(z, data<A>(grad), data<T>(query), data<T>(key), data<A>(stats), mutable_data<A>(delta),
             mutable_data<T>(to_query), mutable_data<T>(to_key));
  });
  return {to_query, to_key};
}

}  // namespace
}  // namespace vmemory

STABLE_TORCH_LIBRARY_IMPL(vmemory, CPU, m) {
  m.impl("attention_column_sums_backward", TORCH_BOX(&vmemory::attention_column_sums_backward));
}
