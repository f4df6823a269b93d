#include "contracts/token_merge.h"

#include "common/rows.h"
#include "torch/stable.h"

namespace vmemory {
namespace {

ScalarType wide_of(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// the weight of a row in its token: 1 for a single row, equal for rows whose sizes sum to 0
template <class A>
A share_of(A size, A total, int64_t count) {
  if (count == 1) return A(1);
  return total > A(0) ? size / total : A(1) / A(count);
}

template <class T>
void copy_row(const T* from, int64_t D, T* to) {
  std::memcpy(static_cast<void*>(to), from, D * sizeof(T));
}

// Sums of rows that lie apart.
template <class T>
class Gathered {
  using A = acc_t<T>;

 public:
  // to = the sum of rows order[0] to order[n - 1] of x, with weights if there are any; n at least 2
  template <bool kWeighted>
  void sum(const T* x, int64_t D, const int64_t* order, int64_t n, const A* weight, T* to) {
    row_.resize(n + 4);
    // four more rows are listed, to prefetch them
    for (int64_t i = 0; i < n + 4; ++i) row_[i] = x + order[std::min(i, n - 1)] * D;
    sum_rows<kWeighted>(row_.data(), weight, n, D, levels_,
                        [&](int64_t d, vec<A> s, int64_t lanes) { store_some(to + d, s, lanes); });
  }

 private:
  std::vector<const T*> row_;
  LevelSum<A> levels_;
};

// f(stream, first, last) over rows [first, last) of streams of n
template <class F>
void for_rows(int64_t streams, int64_t n, int64_t bytes, const F& f) {
  parallel_bytes(streams * n, bytes, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end;) {
      const int64_t s = at / n, last = std::min(n, at % n + end - at);
      f(s, at % n, last);
      at += last - at % n;
    }
  });
}

std::tuple<Tensor, Tensor> token_merge(const Tensor& x_, std::optional<Tensor> size_, const Tensor& order_,
                                       const Tensor& start_) {
  contract::token_merge(x_, size_, order_, start_);
  const Tensor x = dense(x_), size = size_ ? dense(*size_) : x, order = dense(order_), start = dense(start_);
  const int64_t B = start.size(0), N = start.size(1) - 1, M = x.size(1), D = x.size(2);
  Tensor out = make(x, {B, N, D}), total = make(x, {B, N}, wide_of(x));
  dispatch_floating(x.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    using A = acc_t<T>;
    for_rows(B, N, 2 * B * M * (D + 8) * sizeof(T), [&](int64_t s, int64_t first, int64_t last) {
      const T* from = data<T>(x) + s * M * D;
      const A* sizes = size_ ? data<A>(size) + s * M : nullptr;
      const int64_t *rows = data<int64_t>(order) + s * M, *begin = data<int64_t>(start) + s * (N + 1);
      T* to = mutable_data<T>(out) + s * N * D;
      A* totals = mutable_data<A>(total) + s * N;
      Gathered<T> gathered;
      std::vector<A> weight;
      for (int64_t j = first; j < last; ++j) {
        const int64_t* row = rows + begin[j];
        const int64_t n = begin[j + 1] - begin[j];
        A sum = 0;
        for (int64_t i = 0; i < n; ++i) sum += sizes ? sizes[row[i]] : A(1);
        totals[j] = sum;
        if (n == 1) {
          copy_row(from + *row * D, D, to + j * D);
          continue;
        }
        weight.resize(n);
        for (int64_t i = 0; i < n; ++i) weight[i] = share_of(sizes ? sizes[row[i]] : A(1), sum, n);
        gathered.template sum<true>(from, D, row, n, weight.data(), to + j * D);
      }
    });
  });
  return {out, total};
}

Tensor token_merge_backward(const Tensor& grad_, std::optional<Tensor> size_, const Tensor& total_,
                            const Tensor& place_, const Tensor& start_) {
  contract::token_merge_backward(grad_, size_, total_, place_, start_);
  const Tensor grad = dense(grad_), total = dense(total_), place = dense(place_), start = dense(start_);
  const Tensor size = size_ ? dense(*size_) : grad;
  const int64_t B = place.size(0), N = start.size(1) - 1, M = place.size(1), D = grad.size(2);
  Tensor out = make(grad, {B, M, D});
  dispatch_floating(grad.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    using A = acc_t<T>;
    for_rows(B, M, 2 * B * M * D * sizeof(T), [&](int64_t s, int64_t first, int64_t last) {
      const A *sizes = size_ ? data<A>(size) + s * M : nullptr, *totals = data<A>(total) + s * N;
      const int64_t *places = data<int64_t>(place) + s * M, *begin = data<int64_t>(start) + s * (N + 1);
      for (int64_t i = first; i < last; ++i) {
        const int64_t j = places[i], n = begin[j + 1] - begin[j];
        const T* from = data<T>(grad) + (s * N + j) * D;
        T* to = mutable_data<T>(out) + (s * M + i) * D;
        if (n == 1) {
          copy_row(from, D, to);
          continue;
        }
        const A share = share_of(sizes ? sizes[i] : A(1), totals[j], n);
        for_channels<A>(
            D, [&](int64_t d, int64_t lanes) { store_some(to + d, load_some(from + d, lanes) * share, lanes); });
      }
    });
  });
  return out;
}

Tensor token_unmerge(const Tensor& x_, const Tensor& place_) {
  contract::token_unmerge(x_, place_);
  const Tensor x = dense(x_), place = dense(place_);
  const int64_t B = place.size(0), N = x.size(1), M = place.size(1), D = x.size(2);
  Tensor out = make(x, {B, M, D});
  dispatch_floating(x.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    for_rows(B, M, 2 * B * M * D * sizeof(T), [&](int64_t s, int64_t first, int64_t last) {
      for (int64_t i = s * M + first; i < s * M + last; ++i)
        copy_row(data<T>(x) + (s * N + data<int64_t>(place)[i]) * D, D, mutable_data<T>(out) + i * D);
    });
  });
  return out;
}

Tensor token_unmerge_backward(const Tensor& grad_, const Tensor& order_, const Tensor& start_) {
  contract::token_unmerge_backward(grad_, order_, start_);
  const Tensor grad = dense(grad_), order = dense(order_), start = dense(start_);
  const int64_t B = start.size(0), N = start.size(1) - 1, M = grad.size(1), D = grad.size(2);
  Tensor out = make(grad, {B, N, D});
  dispatch_floating(grad.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    for_rows(B, N, 2 * B * M * D * sizeof(T), [&](int64_t s, int64_t first, int64_t last) {
      const T* from = data<T>(grad) + s * M * D;
      const int64_t *rows = data<int64_t>(order) + s * M, *begin = data<int64_t>(start) + s * (N + 1);
      Gathered<T> gathered;
      for (int64_t j = first; j < last; ++j) {
        const int64_t* row = rows + begin[j];
        const int64_t n = begin[j + 1] - begin[j];
        T* to = mutable_data<T>(out) + (s * N + j) * D;
        n == 1 ? copy_row(from + *row * D, D, to) : gathered.template sum<false>(from, D, row, n, nullptr, to);
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace vmemory

STABLE_TORCH_LIBRARY_IMPL(vmemory, CPU, m) {
  m.impl("token_merge", TORCH_BOX(&vmemory::token_merge));
  m.impl("token_merge_backward", TORCH_BOX(&vmemory::token_merge_backward));
  m.impl("token_unmerge", TORCH_BOX(&vmemory::token_unmerge));
  m.impl("token_unmerge_backward", TORCH_BOX(&vmemory::token_unmerge_backward));
}
