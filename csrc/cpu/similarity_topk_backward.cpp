#include <cmath>

#include "common/dot_tile.h"
#include "common/rows.h"
#include "contracts/similarity_topk.h"
#include "torch/stable.h"

namespace vmemory {
namespace {

constexpr int64_t kSmall = 1 << 16;  // products below which a second thread costs more than it saves

struct Sizes {
  int64_t S, Q, M, D, k;
  bool cosine;
};

template <class T, class A>
struct Found {
  const T* memory;
  const float* scale;
  const int64_t* index;  // [S, Q, k]
  const A* grad;         // [S, Q, k]
  const A* value;        // [S, Q, k]
};

template <class A, class T>
A norm(const T* row, int64_t D) {
  vec<A> square{};
  for_channels<A>(D, [&](int64_t d, int64_t lanes) {
    const vec<A> x = load_some_row<A>(row, d, lanes);
    square = multiply_add(x, x, square);
  });
  return std::sqrt(sum<A>(square));
}

// sum += weight * row
template <class A, class T>
void add_row(LevelSum<A>& sum, const T* row, A weight, int64_t D) {
  for_channels<A>(D, [&](int64_t d, int64_t lanes) { sum.add(d, load_some_row<A>(row, d, lanes) * weight, lanes); });
  sum.close();
}

// out = sum - weight * own
template <class A, class T>
void write_row(T* out, const LevelSum<A>& sum, const T* own, A weight, int64_t D) {
  for_channels<A>(D, [&](int64_t d, int64_t lanes) {
    store_some(out + d, sum.total(d, lanes) - load_some(own + d, lanes) * weight, lanes);
  });
}

// d score / d query = row / (|q| |m|) - score q / |q|^2 and the same with the two exchanged; the second terms fall away
// for the dot product, and where a norm is clamped, which makes it a constant
template <class A>
struct Share {
  A other = 0, self = 0;
};

template <class U, class T, class A>
void into_query(const Sizes& z, const U* query, const Found<T, A>& found, U* out, Share<A>* into_row) {
  constexpr A eps = A(1e-8);
  parallel(z.S * z.Q, kSmall / (z.k * z.D + 1), [&](int64_t begin, int64_t end) {
    LevelSum<A> total(z.D);
    for (int64_t place = begin; place < end; ++place) {
      const U* q = query + place * z.D;
      const A query_norm = z.cosine ? norm<A>(q, z.D) : A(1), a = z.cosine && query_norm < eps ? eps : query_norm;
      double self = 0;
      total.reset(z.D);
      for (int64_t e = place * z.k; e < (place + 1) * z.k; ++e) {
        if (found.index[e] < 0) continue;
        const int64_t slot = place / z.Q * z.M + found.index[e];
        const T* row = found.memory + slot * stored_elements<T>(z.D);
        const A scale = found.scale ? A(found.scale[slot]) : A(1), grad = found.grad[e];
        const A row_norm = z.cosine ? norm<A>(row, z.D) * std::fabs(scale) : A(1);
        const A b = z.cosine && row_norm < eps ? eps : row_norm;
        into_row[e].other = grad / (a * b);
        if (z.cosine && row_norm >= eps) into_row[e].self = grad * found.value[e] / (b * b);
        if (z.cosine && query_norm >= eps) self += grad * found.value[e] / (a * a);
        add_row(total, row, into_row[e].other * scale, z.D);
      }
      if (out != nullptr) write_row(out + place * z.D, total, q, static_cast<A>(self), z.D);
    }
  });
}

// every found row sums the gradients of its queries in their order, in one thread and in the accumulation type
template <class T, class A>
void into_memory(const Sizes& z, const T* query, const Found<T, A>& found, const Share<A>* share, T* out) {
  std::vector<std::pair<int64_t, int64_t>> entries;
  for (int64_t e = 0; e < z.S * z.Q * z.k; ++e)
    if (found.index[e] >= 0) entries.emplace_back(e / (z.Q * z.k) * z.M + found.index[e], e);
  std::sort(entries.begin(), entries.end());
  parallel(z.S * z.M, kSmall / (z.D + 1), [&](int64_t begin, int64_t end) {
    std::fill_n(reinterpret_cast<char*>(out + begin * z.D), (end - begin) * z.D * sizeof(T), 0);
    LevelSum<A> total(z.D);
    auto entry = std::lower_bound(entries.begin(), entries.end(), std::pair<int64_t, int64_t>(begin, 0));
    while (entry != entries.end() && entry->first < end) {
      const int64_t row = entry->first;
      double self = 0;
      total.reset(z.D);
      for (; entry != entries.end() && entry->first == row; ++entry) {
        self += share[entry->second].self;
        add_row(total, query + entry->second / z.k * z.D, share[entry->second].other, z.D);
      }
      write_row(out + row * z.D, total, found.memory + row * z.D, static_cast<A>(self), z.D);
    }
  });
}

std::tuple<Tensor, Tensor> similarity_topk_backward(const Tensor& grad_, const Tensor& value_, const Tensor& index_,
                                                    const Tensor& query_, const Tensor& memory_,
                                                    std::optional<Tensor> scale_, std::string metric, bool for_query,
                                                    bool for_memory) {
  contract::similarity_topk_backward(grad_, value_, index_, query_, memory_, scale_, metric, for_memory);
  const Tensor grad = dense(grad_), query = dense(query_), memory = dense(memory_), value = dense(value_);
  const Tensor index = dense(index_), scale = scale_ ? dense(*scale_) : grad;
  const Sizes z{query.size(0), query.size(1), memory.size(1), query.size(2), index.size(2), metric == "cosine"};
  Tensor grad_query = make(query, for_query ? Ints{z.S, z.Q, z.D} : Ints{0});
  Tensor grad_memory = make(query, for_memory ? Ints{z.S, z.M, z.D} : Ints{0});
  dispatch_floating(query.scalar_type(), [&](auto u) {
    using U = typename decltype(u)::type;
    using A = acc_t<U>;
    std::vector<Share<A>> share(z.S * z.Q * z.k);
    const auto run = [&](auto t) {
      using T = typename decltype(t)::type;
      const Found<T, A> found{data<T>(memory), scale_ ? data<float>(scale) : nullptr, data<int64_t>(index),
                              data<A>(grad), data<A>(value)};
      into_query(z, data<U>(query), found, for_query ? mutable_data<U>(grad_query) : nullptr, share.data());
      if constexpr (std::is_same_v<T, U>)
        if (for_memory) into_memory(z, data<U>(query), found, share.data(), mutable_data<U>(grad_memory));
    };
    dispatch_stored<U>(memory.scalar_type(), run);
  });
  return {grad_query, grad_memory};
}

}  // namespace
}  // namespace vmemory

STABLE_TORCH_LIBRARY_IMPL(vmemory, CPU, m) {
  m.impl("similarity_topk_backward", TORCH_BOX(&vmemory::similarity_topk_backward));
}
