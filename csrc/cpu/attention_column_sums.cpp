#include "common/column_sums.h"
#include "torch/stable.h"

namespace vmemory {
namespace {

// largest scores and sums of the queries [first, first + count) of one head, online over blocks of keys
template <class T, class A>
void row_stats(const MapSizes& z, const Rows<T>& query, const Rows<T>& keys, int64_t first, int64_t count, A* largest,
               A* sum) {
  constexpr int64_t L = kLanes<A>;
  ScoreBlocks<A> blocks(z, count);
  blocks.take_queries(query, first, count);
  Lines<A> most(blocks.lanes()), total(blocks.lanes());
  std::fill_n(most.get(), blocks.lanes(), -std::numeric_limits<A>::infinity());
  std::fill_n(total.get(), blocks.lanes(), A(0));
  const int64_t seen = z.seen(first + count - 1);
  for (int64_t k = 0; k < seen; k += kKeyBlock) {
    const int64_t n = std::min(kKeyBlock, seen - k);
    blocks.take_keys(keys, k, n);
    blocks.for_tiles([&](const QueryTile& t) {
      for (int64_t w = 0; w < t.vectors; ++w) {
        A *m = most.get() + t.first + w * L, *s = total.get() + t.first + w * L;
        const vec<A> before = load(m);
        vec<A> now = before;
        for (int64_t j = 0; j < n; ++j) now = vmax<A>(load(blocks.score(t, j, w)), now);
        // a query that has met nothing but -inf must not take -inf from it
        const vec<A> base = now > -std::numeric_limits<A>::infinity() ? now : vec<A>{};
        vec<A> sums[4] = {};
        for (int64_t j = 0; j < n; ++j) sums[j % 4] += exp<A>(load(blocks.score(t, j, w)) - base);
        store(s, load(s) * exp<A>(before - base) + ((sums[0] + sums[1]) + (sums[2] + sums[3])));
        store(m, now);
      }
    });
  }
  for (int64_t i = 0; i < count; ++i) {
    const A m = most.get()[i];
    largest[first + i] = m > -std::numeric_limits<A>::infinity() ? m : A(0);
    sum[first + i] = total.get()[i];
  }
}

// sums of the columns [begin, end) of one head
template <class T, class A>
void column_sums(ScoreBlocks<A>& blocks, const QueryStats<A>& stats, const Rows<T>& keys, int64_t begin, int64_t end,
                 A* out) {
  constexpr int64_t L = kLanes<A>;
  Lines<A> total(kKeyBlock * L);
  for (int64_t k = begin; k < end; k += kKeyBlock) {
    const int64_t n = std::min(kKeyBlock, end - k);
    blocks.take_keys(keys, k, n);
    std::fill_n(total.get(), n * L, A(0));
    blocks.for_tiles([&](const QueryTile& t) {
      for (int64_t j = 0; j < n; ++j) {
        vec<A> sum{};
        for (int64_t w = 0; w < t.vectors; ++w)
          sum += stats.where_seen(t, w, k + j, stats.weights(t, w, blocks.score(t, j, w)));
        store(total.get() + j * L, load(total.get() + j * L) + sum);
      }
    });
    for (int64_t j = 0; j < n; ++j) out[k + j] = sum<A>(load(total.get() + j * L));
  }
}

template <class T>
void forward(const MapSizes& z, const T* query, const T* key, acc_t<T>* out, acc_t<T>* stats) {
  using A = acc_t<T>;
  const int64_t heads = z.S * z.G, vectors = (z.N + kLanes<A> - 1) / kLanes<A>;
  const int64_t threads = torch::stable::get_num_threads();
  const auto rows = [&](const T* x, int64_t n, int64_t head) {
    return head_rows(x, nullptr, head / z.G, n, z.G, head % z.G, z.E);
  };
  const int64_t work = z.N * (z.M + 1) * (z.E + 1) + 1,
                row_pieces = pieces_of(heads, vectors, kProductVectors, threads);
  parallel(heads * row_pieces, kSmallAttention / (work / row_pieces + 1), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t p = item % row_pieces, head = item / row_pieces;
      const int64_t first = p * vectors / row_pieces * kLanes<A>;
      const int64_t count = std::min((p + 1) * vectors / row_pieces * kLanes<A>, z.N) - first;
      row_stats(z, rows(query, z.N, head), rows(key, z.M, head), first, count, stats + head * z.N,
                stats + (heads + head) * z.N);
    }
  });
  const int64_t key_blocks = (z.M + kKeyBlock - 1) / kKeyBlock, pieces = pieces_of(heads, key_blocks, 1, threads);
  parallel(heads * pieces, kSmallAttention / (work / pieces + 1), [&](int64_t begin, int64_t end) {
    ScoreBlocks<A> blocks(z, z.N);
    QueryStats<A> of(blocks.lanes());
    for (int64_t item = begin; item < end; ++item) {
      const int64_t p = item % pieces, head = item / pieces;
      if (item == begin || p == 0) {
        blocks.take_queries(rows(query, z.N, head), 0, z.N);
        of.take(z, stats + head * z.N, stats + (heads + head) * z.N, 0, z.N, blocks.lanes());
      }
      column_sums(blocks, of, rows(key, z.M, head), p * key_blocks / pieces * kKeyBlock,
                  std::min((p + 1) * key_blocks / pieces * kKeyBlock, z.M), out + head * z.M);
    }
  });
}

std::tuple<Tensor, Tensor> attention_column_sums(const Tensor& query_, const Tensor& key_, bool causal) {
  const Tensor query = dense(query_), key = dense(key_);
  const MapSizes z{query.size(0), query.size(1), query.size(2), query.size(3), key.size(1), causal};
  const ScalarType wide = query.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor out = make(query, {z.S, z.G, z.M}, wide), stats = make(query, {2, z.S, z.G, z.N}, wide);
  dispatch_floating(query.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    using A = acc_t<T>;
    if (z.N == 0) std::fill_n(mutable_data<A>(out), out.numel(), A(0));
    if (stats.numel() > 0) forward(z, data<T>(query), data<T>(key), mutable_data<A>(out), mutable_data<A>(stats));
  });
  return {out, stats};
}

}  // namespace
}  // namespace vmemory

STABLE_TORCH_LIBRARY_IMPL(vmemory, CPU, m) {
  m.impl("attention_column_sums", TORCH_BOX(&vmemory::attention_column_sums));
}
