#include "common/column_sums.h"
#include "contracts/attention.h"
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
        // -inf - (-inf) would be NaN for a query whose scores so far are all -inf
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

// Maps whose rows fit the second-level cache are computed once instead of twice: the weights of a tile of queries and
// keys are kept until the sums of its rows are known.
constexpr int64_t kPanelBytes = 1 << 20;
constexpr int64_t kPanelQueries = 480;  // per partial sum, whatever the number of threads

template <class A>
bool fits_panel(const MapSizes& z) {
  return tile_rows(z.M) * kProductVectors * kLanes<A> * int64_t(sizeof(A)) <= kPanelBytes;
}

template <class T, class A>
class Panel {
 public:
  explicit Panel(const MapSizes& z)
      : z_(z),
        wide_(padded_channels<A>(z.E)),
        query_(kProductVectors * L * wide_),
        keys_(kKeyBlock * wide_),
        weight_(tile_rows(z.M) * kProductVectors * L),
        total_(z.M * L),
        of_(kProductVectors * L) {}

  // column sums over the queries [first, first + count), their largest scores and their sums
  void run(const Rows<T>& query, const Rows<T>& keys, int64_t first, int64_t count, A* out, A* largest, A* sums) {
    std::fill_n(total_.get(), z_.M * L, A(0));
    for_query_tiles<A>(count, [&](const QueryTile& t) {
      const int64_t begin = first + t.first, seen = z_.seen(begin + t.count - 1);
      const QueryTile own{0, t.count, t.vectors};
      score(query, keys, begin, seen, own);
      for (int64_t w = 0; w < t.vectors; ++w) exponentiate(own, w, seen, largest + begin, sums + begin);
      of_.take(z_, largest, sums, begin, t.count, t.width<A>());
      for (int64_t j = 0; j < seen; ++j) {
        vec<A> s = load(total_.get() + j * L);
        for (int64_t w = 0; w < t.vectors; ++w)
          s += of_.where_seen(own, w, j, load(at(own, j, w)) * load(of_.inverse.get() + w * L));
        store(total_.get() + j * L, s);
      }
    });
    for (int64_t j = 0; j < z_.M; ++j) out[j] = sum<A>(load(total_.get() + j * L));
  }

 private:
  static constexpr int64_t L = kLanes<A>;

  A* at(const QueryTile& t, int64_t j, int64_t w) const { return weight_.get() + j * t.width<A>() + w * L; }

  void score(const Rows<T>& query, const Rows<T>& keys, int64_t first, int64_t seen, const QueryTile& t) {
    transpose_rows(query, first, t.count, t.width<A>(), A(1 / std::sqrt(double(z_.E))), query_.get());
    for (int64_t k = 0; k < seen; k += kKeyBlock) {
      const int64_t n = std::min(kKeyBlock, seen - k);
      copy_rows(keys, k, n, tile_rows(n), wide_, keys_.get());
      score_tile(keys_.get(), n, wide_, query_.get(), z_.E, t, at(t, k, 0));
    }
    for (int64_t i = 0; i < t.count; ++i)
      for (int64_t j = z_.seen(first + i); j < seen; ++j) at(t, j, 0)[i] = -std::numeric_limits<A>::infinity();
  }

  // scores of a vector of queries to exp(score - largest)
  void exponentiate(const QueryTile& t, int64_t w, int64_t seen, A* largest, A* sums) {
    vec<A> most = broadcast(-std::numeric_limits<A>::infinity());
    for (int64_t j = 0; j < seen; ++j) most = vmax<A>(load(at(t, j, w)), most);
    // -inf - (-inf) would be NaN for a query whose scores so far are all -inf
    const vec<A> base = most > -std::numeric_limits<A>::infinity() ? most : vec<A>{};
    vec<A> total{};
    for (int64_t k = 0; k < seen; k += kKeyBlock) {
      vec<A> part[4] = {};
      for (int64_t j = k; j < std::min(k + kKeyBlock, seen); ++j) {
        const vec<A> x = exp<A>(load(at(t, j, w)) - base);
        store(at(t, j, w), x);
        part[j % 4] += x;
      }
      total += (part[0] + part[1]) + (part[2] + part[3]);
    }
    const int64_t lanes = std::min(L, t.count - w * L);
    store_some(largest + w * L, base, lanes);
    store_some(sums + w * L, total, lanes);
  }

  const MapSizes& z_;
  int64_t wide_;
  Lines<A> query_, keys_, weight_, total_;
  QueryStats<A> of_;
};

template <class T>
void forward_in_panels(const MapSizes& z, const T* query, const T* key, acc_t<T>* out, acc_t<T>* stats) {
  using A = acc_t<T>;
  const int64_t heads = z.S * z.G, pieces = (z.N + kPanelQueries - 1) / kPanelQueries;
  Lines<A> partial(pieces > 1 ? heads * pieces * z.M : 0);
  A* const sums = pieces > 1 ? partial.get() : out;
  const int64_t work = std::min(z.N, kPanelQueries) * (z.M + 1) * (z.E + 1) + 1;
  parallel(heads * pieces, kSmallAttention / work, [&](int64_t begin, int64_t end) {
    Panel<T, A> panel(z);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / pieces, first = item % pieces * kPanelQueries;
      panel.run(head_rows(query, nullptr, head / z.G, z.N, z.G, head % z.G, z.E),
                head_rows(key, nullptr, head / z.G, z.M, z.G, head % z.G, z.E), first,
                std::min(kPanelQueries, z.N - first), sums + item * z.M, stats + head * z.N,
                stats + (heads + head) * z.N);
    }
  });
  for (int64_t i = 0; pieces > 1 && i < heads * z.M; ++i) {
    A s = 0;
    for (int64_t p = 0; p < pieces; ++p) s += sums[(i / z.M * pieces + p) * z.M + i % z.M];
    out[i] = s;
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
  contract::attention_column_sums(query_, key_);
  const Tensor query = dense(query_), key = dense(key_);
  const MapSizes z{query.size(0), query.size(1), query.size(2), query.size(3), key.size(1), causal};
  const ScalarType wide = query.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor out = make(query, {z.S, z.G, z.M}, wide), stats = make(query, {2, z.S, z.G, z.N}, wide);
  dispatch_floating(query.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    using A = acc_t<T>;
    if (z.N == 0) std::fill_n(mutable_data<A>(out), out.numel(), A(0));
    const auto run = fits_panel<A>(z) ? forward_in_panels<T> : forward<T>;
    if (stats.numel() > 0) run(z, data<T>(query), data<T>(key), mutable_data<A>(out), mutable_data<A>(stats));
  });
  return {out, stats};
}

}  // namespace
}  // namespace vmemory

STABLE_TORCH_LIBRARY_IMPL(vmemory, CPU, m) {
  m.impl("attention_column_sums", TORCH_BOX(&vmemory::attention_column_sums));
}
