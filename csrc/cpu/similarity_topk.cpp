#include <cmath>
#include <memory>

#include "common/topk.h"
#include "torch/stable.h"

namespace vmemory {
namespace {

constexpr int64_t kBlockRows = 64;  // rows scored before they are filtered; their scores stay in cache

// kLanes values of a memory row, int8 included
template <class A, class T>
vec<A> read(const T* p, int64_t n) {
  if constexpr (std::is_same_v<T, int8_t>) {
#if defined(__AVX512F__)
    // GCC widens bytes one by one otherwise
    if constexpr (std::is_same_v<A, float>)
      if (n == kLanes<A>) {
        const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return reinterpret_cast<vec<A>>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(narrow)));
      }
#endif
    typedef int8_t bytes __attribute__((vector_size(kLanes<A>)));
    bytes raw{};
    std::memcpy(&raw, p, n);
    return __builtin_convertvector(raw, vec<A>);
  } else {
    return n == kLanes<A> ? load(p) : load(p, n);
  }
}

// Dot products of one row with QB queries, and with itself. Each (row, query) sum has its own two accumulators in one
// order, so that equal rows score equally wherever they lie and whatever stands beside them.
template <int QB, class A, class T>
void dots(const T* row, const A* query, int64_t stride, int64_t D, A* out, A* square) {
  constexpr int64_t L = kLanes<A>;
  vec<A> sum[QB][2] = {}, own[2] = {};
  int64_t d = 0;
  for (; d + 2 * L <= D; d += 2 * L)
    for (int h = 0; h < 2; ++h) {
      const vec<A> x = read<A>(row + d + h * L, L);
      own[h] += x * x;
      for (int q = 0; q < QB; ++q) sum[q][h] += x * load(query + q * stride + d + h * L);
    }
  for (; d < D; d += L) {
    const int64_t n = D - d < L ? D - d : L;
    const vec<A> x = read<A>(row + d, n);
    own[0] += x * x;
    for (int q = 0; q < QB; ++q)
      sum[q][0] += x * (n == L ? load(query + q * stride + d) : load(query + q * stride + d, n));
  }
  for (int q = 0; q < QB; ++q) out[q] = vmemory::sum<A>(sum[q][0] + sum[q][1]);
  *square = vmemory::sum<A>(own[0] + own[1]);
}

// Rows by packed queries [D, kLanes * V]: every lane is a query, every step a broadcast of one memory value.
template <int R, int V, class A>
void outer(const A* const* rows, const A* packed, int64_t D, A* out, int64_t pitch) {
  constexpr int64_t L = kLanes<A>;
  vec<A> sum[R][V] = {};
  for (int64_t d = 0; d < D; ++d) {
    vec<A> q[V];
    for (int v = 0; v < V; ++v) q[v] = load(packed + (d * V + v) * L);
    for (int r = 0; r < R; ++r) {
      const A x = rows[r][d];
      for (int v = 0; v < V; ++v) sum[r][v] += q[v] * x;
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(out + r * pitch + v * L, sum[r][v]);
}

template <class A>
A guarded(A square) {
  const A norm = std::sqrt(square), eps = A(1e-8);
  return norm < eps ? eps : norm;
}

template <class A, class T>
struct Search {
  const A* query;            // [Q, D]
  const T* memory;           // [M, D]
  const bool* where;         // [M] or null
  const float* scale;        // [M] or null
  int64_t Q, M, D, k, rows;  // rows: how many are searched
  bool cosine;
  std::vector<A> norm;  // [Q]

  A score(A product, A square, int64_t q, int64_t m) const {
    const A s = scale ? static_cast<A>(scale[m]) : A(1);
    if (!cosine) return product * s;
    return product * s / (norm[q] * guarded(square * s * s));
  }

  void offer(TopK<A>& best, A value, int64_t m) const {
    // written so that NaN goes on to be asked
    if (!(value < best.threshold())) best.offer(value, m);
  }

  // few queries: the scan is bound by reading the memory
  void scan(int64_t begin, int64_t end, TopK<A>* best) const {
    A product[8], square;
    for (int64_t m = begin; m < end; ++m) {
      if (where && !where[m]) continue;
      for (int64_t q = 0; q < Q; q += 8) {
        const T* row = memory + m * D;
        const A* from = query + q * D;
        const int64_t n = Q - q < 8 ? Q - q : 8;
        switch (n) {
          case 1:
            dots<1>(row, from, D, D, product, &square);
            break;
          case 2:
            dots<2>(row, from, D, D, product, &square);
            break;
          case 3:
            dots<3>(row, from, D, D, product, &square);
            break;
          case 4:
            dots<4>(row, from, D, D, product, &square);
            break;
          case 5:
            dots<5>(row, from, D, D, product, &square);
            break;
          case 6:
            dots<6>(row, from, D, D, product, &square);
            break;
          case 7:
            dots<7>(row, from, D, D, product, &square);
            break;
          default:
            dots<8>(row, from, D, D, product, &square);
            break;
        }
        for (int64_t i = 0; i < n; ++i) offer(best[q + i], score(product[i], square, q + i, m), m);
      }
    }
  }

  // many queries: blocks of rows against packed queries, scores of a block kept in cache until they are filtered
  template <int V>
  void tiled(int64_t begin, int64_t end, const A* packed, TopK<A>* best) const {
    constexpr int64_t L = kLanes<A>, lanes = V * L;
    constexpr int R = 24 / V < 8 ? 24 / V : 8;  // as many accumulators as registers allow
    const int64_t groups = (Q + lanes - 1) / lanes, pitch = groups * lanes;
    std::vector<A> tile(kBlockRows * pitch), square(kBlockRows), wide(sizeof(T) == sizeof(A) ? 0 : kBlockRows * D);
    for (int64_t first = begin; first < end; first += kBlockRows) {
      const int64_t n = std::min(end - first, kBlockRows);
      const A* rows[kBlockRows];
      for (int64_t r = 0; r < n; ++r) {
        const T* row = memory + (first + r) * D;
        if constexpr (std::is_same_v<A, T>) {
          rows[r] = row;
        } else {
          A* to = wide.data() + r * D;
          for (int64_t d = 0; d < D; d += L) {
            const int64_t left = D - d < L ? D - d : L;
            store(to + d, read<A>(row + d, left), left);
          }
          rows[r] = to;
        }
        if (cosine) square[r] = dot(rows[r], rows[r], D);
      }
      for (int64_t group = 0; group < groups; ++group) {
        const A* queries = packed + group * D * lanes;
        A* out = tile.data() + group * lanes;
        int64_t r = 0;
        for (; r + R <= n; r += R) outer<R, V>(rows + r, queries, D, out + r * pitch, pitch);
        for (; r < n; ++r) outer<1, V>(rows + r, queries, D, out + r * pitch, pitch);
      }
      for (int64_t r = 0; r < n; ++r) {
        const int64_t m = first + r;
        if (where && !where[m]) continue;
        const A s = scale ? static_cast<A>(scale[m]) : A(1);
        const A share = cosine ? s / guarded(square[r] * s * s) : s;
        for (int64_t q = 0; q < Q; ++q) offer(best[q], tile[r * pitch + q] * share / (cosine ? norm[q] : A(1)), m);
      }
    }
  }

  // vectors of queries that a row meets at once
  int width() const { return Q <= kLanes<A> ? 1 : (Q <= 2 * kLanes<A> ? 2 : 4); }

  std::vector<A> pack() const {
    const int64_t lanes = width() * kLanes<A>;
    const int64_t groups = (Q + lanes - 1) / lanes;
    std::vector<A> packed(groups * D * lanes, A(0));
    for (int64_t q = 0; q < Q; ++q)
      for (int64_t d = 0; d < D; ++d) packed[(q / lanes * D + d) * lanes + q % lanes] = query[q * D + d];
    return packed;
  }

  void run(A* values, int64_t* index) {
    norm.resize(Q);
    for (int64_t q = 0; q < Q; ++q) norm[q] = guarded(dot(query + q * D, query + q * D, D));
    const bool few = Q <= 8;
    const std::vector<A> packed = few ? std::vector<A>() : pack();
    // one list of candidates per chunk, merged under the tie rule: the split does not show in the result
    const int64_t grain = std::max<int64_t>(kBlockRows, (1 << 16) / (D + 1));
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t chunk = std::max(grain, (rows + threads - 1) / threads),
                  chunks = rows ? (rows + chunk - 1) / chunk : 0;
    std::vector<std::vector<TopK<A>>> best(std::max<int64_t>(chunks, 1), std::vector<TopK<A>>(Q, TopK<A>(k)));
    parallel(chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        const int64_t from = c * chunk, to = std::min(rows, from + chunk);
        if (few) {
          scan(from, to, best[c].data());
        } else if (width() == 1) {
          tiled<1>(from, to, packed.data(), best[c].data());
        } else if (width() == 2) {
          tiled<2>(from, to, packed.data(), best[c].data());
        } else {
          tiled<4>(from, to, packed.data(), best[c].data());
        }
      }
    });
    for (int64_t q = 0; q < Q; ++q) {
      for (int64_t c = 1; c < chunks; ++c) best[0][q].merge(best[c][q]);
      const auto found = best[0][q].sorted();
      for (int64_t i = 0; i < k; ++i) {
        const bool there = i < static_cast<int64_t>(found.size());
        values[q * k + i] = there ? found[i].score : -std::numeric_limits<A>::infinity();
        index[q * k + i] = there ? found[i].index : -1;
      }
    }
  }
};

// f(tag of the storage type) for a memory of any supported dtype
template <class F>
void dispatch_memory(ScalarType type, F&& f) {
  if (type == ScalarType::Char) {
    f(tag<int8_t>{});
  } else {
    dispatch_floating(type, f);
  }
}

std::tuple<Tensor, Tensor> similarity_topk(const Tensor& query_, const Tensor& memory_, std::optional<Tensor> count,
                                           std::optional<Tensor> where_, std::optional<Tensor> scale_, int64_t k,
                                           std::string metric) {
  const Tensor memory = dense(memory_);
  const int64_t S = query_.size(0), Q = query_.size(1), D = query_.size(2), M = memory.size(1);
  const bool twice = query_.scalar_type() == ScalarType::Double;
  const ScalarType wide = twice ? ScalarType::Double : ScalarType::Float;
  const Tensor query = dense(torch::stable::to(query_, wide));
  const Tensor where = where_ ? dense(*where_) : query, scale = scale_ ? dense(*scale_) : query;
  Tensor values = make(query, {S, Q, k}, wide), index = make(query, {S, Q, k}, ScalarType::Long);
  const auto run = [&](auto accumulate, auto storage) {
    using A = typename decltype(accumulate)::type;
    using T = typename decltype(storage)::type;
    for (int64_t s = 0; s < S; ++s) {
      const int64_t held = count ? std::clamp<int64_t>(data<int64_t>(*count)[s], 0, M) : M;
      Search<A, T> search{data<A>(query) + s * Q * D,
                          data<T>(memory) + s * M * D,
                          where_ ? data<bool>(where) + s * M : nullptr,
                          scale_ ? data<float>(scale) + s * M : nullptr,
                          Q,
                          M,
                          D,
                          k,
                          held,
                          metric == "cosine",
                          {}};
      search.run(mutable_data<A>(values) + s * Q * k, mutable_data<int64_t>(index) + s * Q * k);
    }
  };
  dispatch_memory(memory.scalar_type(), [&](auto storage) {
    using T = typename decltype(storage)::type;
    if constexpr (std::is_same_v<T, double>) {
      VMEMORY_CHECK(twice, "query: expected the dtype of memory");
      run(tag<double>{}, storage);
    } else if constexpr (std::is_same_v<T, int8_t>) {
      twice ? run(tag<double>{}, storage) : run(tag<float>{}, storage);
    } else {
      VMEMORY_CHECK(!twice, "query: expected the dtype of memory");
      run(tag<float>{}, storage);
    }
  });
  return {values, index};
}

// d(score)/d(query) and d(score)/d(memory) at the chosen rows; memory rows that nobody chose get zero
std::tuple<Tensor, Tensor> similarity_topk_backward(const Tensor& grad_, const Tensor& values_, const Tensor& index_,
                                                    const Tensor& query_, const Tensor& memory_, std::string metric) {
  const Tensor grad = dense(grad_), values = dense(values_), index = dense(index_);
  const Tensor query = dense(query_), memory = dense(memory_);
  const int64_t S = query.size(0), Q = query.size(1), D = query.size(2), M = memory.size(1), k = index.size(2);
  Tensor grad_query = make(query, {S, Q, D}), grad_memory = make(memory, {S, M, D});
  const bool cosine = metric == "cosine";
  dispatch_floating(query.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    using A = acc_t<T>;
    const A eps = A(1e-8);
    for (int64_t s = 0; s < S; ++s) {
      const T *qs = data<T>(query) + s * Q * D, *ms = data<T>(memory) + s * M * D;
      const int64_t* rows = data<int64_t>(index) + s * Q * k;
      const A *g = data<A>(grad) + s * Q * k, *v = data<A>(values) + s * Q * k;
      std::vector<A> query_norm(Q), memory_norm(Q * k);
      for (int64_t q = 0; q < Q; ++q) {
        query_norm[q] = std::sqrt(dot(qs + q * D, qs + q * D, D));
        for (int64_t i = q * k; i < (q + 1) * k; ++i)
          memory_norm[i] = rows[i] < 0 ? A(1) : std::sqrt(dot(ms + rows[i] * D, ms + rows[i] * D, D));
      }
      std::vector<A> to_query(Q * D, A(0)), to_memory(M * D, A(0));
      // by channel, so that no two threads add to one place
      parallel(D, std::max<int64_t>(64, 4096 / (Q * k + 1)), [&](int64_t d0, int64_t d1) {
        for (int64_t q = 0; q < Q; ++q)
          for (int64_t i = q * k; i < (q + 1) * k; ++i) {
            if (rows[i] < 0) continue;
            const A nq = query_norm[q] < eps ? eps : query_norm[q], nm = memory_norm[i] < eps ? eps : memory_norm[i];
            const A across = cosine ? g[i] / (nq * nm) : g[i];
            // below the guard a norm is a constant and has no gradient
            const A along_q = cosine && query_norm[q] >= eps ? g[i] * v[i] / (nq * nq) : A(0);
            const A along_m = cosine && memory_norm[i] >= eps ? g[i] * v[i] / (nm * nm) : A(0);
            const T *x = qs + q * D, *y = ms + rows[i] * D;
            A *gx = to_query.data() + q * D, *gy = to_memory.data() + rows[i] * D;
            for (int64_t d = d0; d < d1; d += kLanes<A>) {
              const int64_t n = d1 - d < kLanes<A> ? d1 - d : kLanes<A>;
              const vec<A> a = load(x + d, n), b = load(y + d, n);
              store(gx + d, load(gx + d, n) + b * across - a * along_q, n);
              store(gy + d, load(gy + d, n) + a * across - b * along_m, n);
            }
          }
      });
      const auto write = [](const std::vector<A>& from, T* to) {
        const int64_t total = static_cast<int64_t>(from.size());
        for (int64_t d = 0; d < total; d += kLanes<A>) {
          const int64_t n = std::min(total - d, kLanes<A>);
          store(to + d, load(from.data() + d, n), n);
        }
      };
      write(to_query, mutable_data<T>(grad_query) + s * Q * D);
      write(to_memory, mutable_data<T>(grad_memory) + s * M * D);
    }
  });
  return {grad_query, grad_memory};
}

}  // namespace
}  // namespace vmemory

STABLE_TORCH_LIBRARY_IMPL(vmemory, CPU, m) {
  m.impl("similarity_topk", TORCH_BOX(&vmemory::similarity_topk));
  m.impl("similarity_topk_backward", TORCH_BOX(&vmemory::similarity_topk_backward));
}
