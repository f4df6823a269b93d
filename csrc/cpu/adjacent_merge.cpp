#include "common/choice.h"
#include "common/descriptor.h"
#include "contracts/adjacent.h"
#include "torch/stable.h"

namespace vmemory {
namespace {

constexpr int64_t kGrainBytes = 1 << 17;  // below this a second thread costs more than it saves

struct Shape {
  int64_t S, T, N, D;
};

// the first entry's weight in a mean
template <class A>
A share(A first, A second) {
  const A total = first + second;
  return total > A(0) ? first / total : A(0.5);
}

// one token through time, from a bank of T entries to one of T - 1
template <class T>
void merge_token(const T* x, const acc_t<T>* size, const Shape& s, int64_t place, T* out, acc_t<T>* sizes) {
  using A = acc_t<T>;
  const int64_t frame = s.N * s.D;
  for (int64_t t = 0; t + 1 < s.T; ++t) {
    const T* from = x + (t > place ? t + 1 : t) * frame;
    T* to = out + t * frame;
    if (t != place) {
      std::memcpy(static_cast<void*>(to), from, s.D * sizeof(T));
      sizes[t * s.N] = size[(t > place ? t + 1 : t) * s.N];
      continue;
    }
    const A wa = share(size[t * s.N], size[(t + 1) * s.N]), wb = A(1) - wa;
    for_channels<A>(s.D, [&](int64_t d, int64_t lanes) {
      store_some(to + d, load_some(from + d, lanes) * wa + load_some(from + frame + d, lanes) * wb, lanes);
    });
    sizes[t * s.N] = size[t * s.N] + size[(t + 1) * s.N];
  }
}

// each token finds its pair and is merged while its rows are still in cache
template <class T>
void merge_tokens(const T* x, const acc_t<T>* size, const Shape& s, int64_t* place, T* out, acc_t<T>* sizes) {
  using A = acc_t<T>;
  const int64_t frame = s.N * s.D;
  parallel(s.S * s.N, kGrainBytes / (s.T * s.D * sizeof(T) + 1), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t stream = item / s.N, n = item % s.N;
      const T* row = x + stream * s.T * frame + n * s.D;
      const int64_t at = stream * s.T * s.N + n, to = stream * (s.T - 1) * s.N + n;
      int64_t chosen = 0;
      A best = 0, before = norm(row, s.D);
      for (int64_t t = 0; t + 1 < s.T; ++t) {
        const T* now = row + t * frame;
        const auto products = dot_and_square(now, now + frame, s.D, t + 2 < s.T ? now + 2 * frame : now);
        const A after = std::sqrt(products.bb), value = cosine(products.ab, before, after);
        if (t == 0 || beats(value, best)) chosen = t, best = value;
        before = after;
      }
      place[item] = chosen;
      merge_token(row, size + at, s, chosen, out + stream * (s.T - 1) * frame + n * s.D, sizes + to);
    }
  });
}

// the pair of frames whose means are most alike
template <class T>
void find_pairs(const T* x, const Shape& s, int64_t* place) {
  using A = acc_t<T>;
  std::vector<A> mean(s.S * s.T * s.D), value(s.S * (s.T - 1));
  parallel(s.S * s.T, kGrainBytes / (s.N * s.D * sizeof(T) + 1), [&](int64_t begin, int64_t end) {
    CellSum<T> sum(s.D);
    for (int64_t f = begin; f < end; ++f) frame_mean(x + f * s.N * s.D, s.D, s.N, mean.data() + f * s.D, sum);
  });
  for (int64_t stream = 0; stream < s.S; ++stream) {
    const A* row = mean.data() + stream * s.T * s.D;
    A* similarity = value.data() + stream * (s.T - 1);
    A before = norm(row, s.D);
    for (int64_t t = 0; t + 1 < s.T; ++t) {
      const A *a = row + t * s.D, *b = a + s.D;
      const auto products = dot_and_square(a, b, s.D, b);
      const A after = std::sqrt(products.bb);
      similarity[t] = cosine(products.ab, before, after);
      before = after;
    }
    place[stream] = first_largest(similarity, s.T - 1, 1);
  }
}

template <class T>
void merge_frames(const T* x, const acc_t<T>* size, const Shape& s, const int64_t* place, T* out, acc_t<T>* sizes) {
  using A = acc_t<T>;
  const int64_t frame = s.N * s.D;
  parallel(s.S * (s.T - 1), kGrainBytes / (frame * sizeof(T) + 1), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t stream = item / (s.T - 1), t = item % (s.T - 1), from = stream * s.T + t + (t > place[stream]);
      const T* row = x + from * frame;
      const A *w = size + from * s.N, *next = w + s.N;
      T* to = out + item * frame;
      if (t != place[stream]) {
        std::memcpy(static_cast<void*>(to), row, frame * sizeof(T));
        std::memcpy(static_cast<void*>(sizes + item * s.N), w, s.N * sizeof(A));
        continue;
      }
      for (int64_t n = 0; n < s.N; ++n, row += s.D, to += s.D) {
        const A wa = share(w[n], next[n]), wb = A(1) - wa;
        for_channels<A>(s.D, [&](int64_t d, int64_t lanes) {
          store_some(to + d, load_some(row + d, lanes) * wa + load_some(row + frame + d, lanes) * wb, lanes);
        });
        sizes[item * s.N + n] = w[n] + next[n];
      }
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> adjacent_merge(const Tensor& bank, const Tensor& size_, std::string level) {
  contract::adjacent_merge(bank, size_, level);
  const Tensor in = dense(bank), size = dense(size_);
  const Shape s{in.size(0), in.size(1), in.size(2), in.size(3)};
  const bool whole = level == "frame";
  Tensor out = make(in, {s.S, s.T - 1, s.N, s.D}), sizes = make(size, {s.S, s.T - 1, s.N});
  Tensor place = make(in, {s.S, whole ? 1 : s.N}, ScalarType::Long);
  dispatch_floating(in.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    using A = acc_t<T>;
    const T* from = data<T>(in);
    int64_t* at = mutable_data<int64_t>(place);
    if (whole) {
      find_pairs(from, s, at);
      merge_frames(from, data<A>(size), s, at, mutable_data<T>(out), mutable_data<A>(sizes));
    } else {
      merge_tokens(from, data<A>(size), s, at, mutable_data<T>(out), mutable_data<A>(sizes));
    }
  });
  return {out, sizes, place};
}

Tensor adjacent_merge_backward(const Tensor& grad_, const Tensor& size_, const Tensor& place_) {
  contract::adjacent_merge_backward(grad_, size_, place_);
  const Tensor grad = dense(grad_), size = dense(size_), place = dense(place_);
  const Shape s{grad.size(0), grad.size(1) + 1, grad.size(2), grad.size(3)};
  const bool whole = place.size(1) == 1;
  Tensor out = make(grad, {s.S, s.T, s.N, s.D});
  dispatch_floating(grad.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    const A* sizes = data<A>(size);
    parallel(s.S * s.T, kGrainBytes / (s.N * s.D * sizeof(T) + 1), [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t stream = item / s.T, t = item % s.T;
        for (int64_t n = 0; n < s.N; ++n) {
          const int64_t pair = data<int64_t>(place)[whole ? stream : stream * s.N + n], behind = t > pair;
          const T* from = data<T>(grad) + ((stream * (s.T - 1) + t - behind) * s.N + n) * s.D;
          T* to = mutable_data<T>(out) + (item * s.N + n) * s.D;
          if (t - behind != pair) {
            std::memcpy(static_cast<void*>(to), from, s.D * sizeof(T));
            continue;
          }
          const A* w = sizes + (stream * s.T + pair) * s.N + n;
          const A first = share(w[0], w[s.N]), weight = behind ? A(1) - first : first;
          for_channels<A>(
              s.D, [&](int64_t d, int64_t lanes) { store_some(to + d, load_some(from + d, lanes) * weight, lanes); });
        }
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace vmemory

STABLE_TORCH_LIBRARY_IMPL(vmemory, CPU, m) {
  m.impl("adjacent_merge", TORCH_BOX(&vmemory::adjacent_merge));
  m.impl("adjacent_merge_backward", TORCH_BOX(&vmemory::adjacent_merge_backward));
}
