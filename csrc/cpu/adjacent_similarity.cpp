#include <limits>

#include "common/descriptor.h"
#include "common/slices.h"
#include "contracts/adjacent.h"
#include "torch/stable.h"

namespace vmemory {
namespace {

constexpr int64_t kBlockBytes = 1 << 14;  // two frames of so many tokens fit a core's first-level cache

struct Shape {
  int64_t S, T, N, D;
  template <class U>
  int64_t bytes() const {
    return S * T * N * D * sizeof(U);
  }
};

// How tokens walk through time: blocks of neighbouring tokens, and, where these do not feed every thread, pieces of
// time that read one frame twice.
struct Walk {
  int64_t tokens, blocks, frames, pieces;

  Walk(const Shape& s, int64_t steps, int64_t row_bytes, int64_t block_bytes) {
    tokens = std::max<int64_t>(1, std::min(s.N, block_bytes / std::max<int64_t>(row_bytes, 1)));
    blocks = (s.N + tokens - 1) / tokens;
    const int64_t threads = threads_for(s.S * s.T * s.N * row_bytes), wanted = threads > 1 ? 4 * threads : 1;
    const int64_t units = std::max<int64_t>(s.S * blocks, 1);
    pieces = std::max<int64_t>(1, std::min((wanted + units - 1) / units, steps / 32));
    frames = (steps + pieces - 1) / pieces;
  }
};

// similarity [S, T - 1, N] and norm [S, T, N] of x [S, T, N, D]
template <class T>
void similarity(const T* x, const Shape& s, acc_t<T>* out, acc_t<T>* norms) {
  using A = acc_t<T>;
  const int64_t pairs = s.T - 1, frame = s.N * s.D;
  const Walk walk(s, pairs, s.D * sizeof(T), kBlockBytes);
  parallel_bytes(s.S * walk.blocks * walk.pieces, s.template bytes<T>(), [&](int64_t begin, int64_t end) {
    std::vector<A> before(walk.tokens);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t block = item % walk.blocks, piece = item / walk.blocks % walk.pieces;
      const int64_t stream = item / walk.blocks / walk.pieces;
      const int64_t n0 = block * walk.tokens, n = std::min(walk.tokens, s.N - n0);
      const int64_t p0 = piece * walk.frames, p1 = std::min(pairs, p0 + walk.frames);
      const T* from = x + stream * s.T * frame + n0 * s.D;
      A* sim = out + stream * pairs * s.N + n0;
      A* keep = norms + stream * s.T * s.N + n0;
      for (int64_t k = 0; k < n; ++k) {
        before[k] = norm(from + p0 * frame + k * s.D, s.D);
        if (p0 == 0) keep[k] = before[k];
      }
      for (int64_t p = p0; p < p1; ++p)
        for (int64_t k = 0; k < n; ++k) {
          const T* row = from + p * frame + k * s.D;
          const auto products = dot_and_square(row, row + frame, s.D, p + 2 < s.T ? row + 2 * frame : row);
          const A after = std::sqrt(products.bb);
          sim[p * s.N + k] = cosine(products.ab, before[k], after);
          keep[(p + 1) * s.N + k] = before[k] = after;
        }
    }
  });
}

template <class T>
void frame_means(const T* x, const Shape& s, acc_t<T>* mean) {
  const int64_t frames = s.S * s.T, bytes = s.template bytes<T>();
  const Slices slices(s.D, frames, threads_for(bytes));
  parallel_bytes(frames * slices.count, bytes, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t f = item / slices.count, d = slices.begin(item % slices.count);
      CellSum<T> sum(slices.size(item % slices.count));
      frame_mean(x + f * s.N * s.D + d, s.D, s.N, mean + f * s.D + d, sum);
    }
  });
}

// for level "frame" the tokens compared are the frames' means
std::tuple<Tensor, Tensor, Tensor> adjacent_similarity(const Tensor& frames, std::string level) {
  contract::adjacent_similarity(frames, level);
  const Tensor in = dense(frames);
  const Shape s{in.size(0), in.size(1), in.size(2), in.size(3)};
  const bool whole = level == "frame";
  const ScalarType wide = in.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const Shape compared{s.S, s.T, whole ? 1 : s.N, s.D};
  Tensor sim = make(in, {s.S, std::max<int64_t>(s.T - 1, 0), compared.N}, wide);
  Tensor norms = make(in, {s.S, s.T, compared.N}, wide);
  Tensor mean = make(in, {s.S, whole ? s.T : 0, 1, s.D}, wide);
  if (s.T == 0) return {sim, norms, mean};
  dispatch_floating(in.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    using A = acc_t<T>;
    if (whole) {
      frame_means(data<T>(in), s, mutable_data<A>(mean));
      similarity(data<A>(mean), compared, mutable_data<A>(sim), mutable_data<A>(norms));
    } else {
      similarity(data<T>(in), compared, mutable_data<A>(sim), mutable_data<A>(norms));
    }
  });
  return {sim, norms, mean};
}

// d cos / d a = b / (|a| |b|) - cos a / |a|^2, without the second term where |a| is clamped: there it is a constant
template <class A>
struct Coefficients {
  A other = 0, self = 0;

  void add(A grad, A cos, A norm_self, A norm_other) {
    constexpr A eps = A(1e-8);
    const A a = norm_self < eps ? eps : norm_self, b = norm_other < eps ? eps : norm_other;
    other = grad / (a * b);
    self = norm_self < eps ? A(0) : grad * cos / (a * a);
  }
};

template <class T>
void similarity_backward(const T* x, const Shape& s, const acc_t<T>* grad, const acc_t<T>* sim, const acc_t<T>* norms,
                         T* out) {
  using A = acc_t<T>;
  const int64_t frame = s.N * s.D;
  // whole frames, because writes out of order would fetch every huge page into the cache twice
  const Walk walk(s, s.T, s.D * sizeof(T), std::numeric_limits<int64_t>::max());
  parallel_bytes(s.S * walk.blocks * walk.pieces, s.template bytes<T>(), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t block = item % walk.blocks, piece = item / walk.blocks % walk.pieces;
      const int64_t stream = item / walk.blocks / walk.pieces;
      const int64_t n0 = block * walk.tokens, n1 = std::min(n0 + walk.tokens, s.N);
      const int64_t t1 = std::min(s.T, (piece + 1) * walk.frames);
      for (int64_t t = piece * walk.frames; t < t1; ++t)
        for (int64_t n = n0; n < n1; ++n) {
          const int64_t at = (stream * s.T + t) * s.N + n, pair = (stream * (s.T - 1) + t) * s.N + n;
          const bool has_before = t > 0, has_after = t + 1 < s.T;
          Coefficients<A> before, after;
          if (has_before) before.add(grad[pair - s.N], sim[pair - s.N], norms[at], norms[at - s.N]);
          if (has_after) after.add(grad[pair], sim[pair], norms[at], norms[at + s.N]);
          const T* row = x + at * s.D;
          const T* row_before = has_before ? row - frame : row;
          const T* row_after = has_after ? row + frame : row;
          const A self = before.self + after.self;
          T* to = out + at * s.D;
          for_channels<A>(s.D, [&](int64_t d, int64_t lanes) {
            vec<A> g = load_some(row + d, lanes) * -self;
            if (has_before) g += load_some(row_before + d, lanes) * before.other;
            if (has_after) g += load_some(row_after + d, lanes) * after.other;
            store_some(to + d, g, lanes);
          });
        }
    }
  });
}

Tensor adjacent_similarity_backward(const Tensor& grad_, const Tensor& compared, const Tensor& similarity_,
                                    const Tensor& norms_) {
  contract::adjacent_similarity_backward(grad_, compared, similarity_, norms_);
  const Tensor in = dense(compared), grad = dense(grad_), sim = dense(similarity_), norms = dense(norms_);
  const Shape s{in.size(0), in.size(1), in.size(2), in.size(3)};
  Tensor out = make(in, {s.S, s.T, s.N, s.D});
  dispatch_floating(in.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    using A = acc_t<T>;
    similarity_backward(data<T>(in), s, data<A>(grad), data<A>(sim), data<A>(norms), mutable_data<T>(out));
  });
  return out;
}

}  // namespace
}  // namespace vmemory

STABLE_TORCH_LIBRARY_IMPL(vmemory, CPU, m) {
  m.impl("adjacent_similarity", TORCH_BOX(&vmemory::adjacent_similarity));
  m.impl("adjacent_similarity_backward", TORCH_BOX(&vmemory::adjacent_similarity_backward));
}
