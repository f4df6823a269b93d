// The element-wise passes around the products of a gated fusion, forward and backward. Torch-free.
#pragma once

#include "pack.cuh"

namespace vmemory::fusion {

constexpr int kThreads = 256;

enum class Activation { kRelu, kGelu, kSilu };

template <class A>
__device__ A logistic(A x) {
  return A(1) / (A(1) + exp(-x));
}
template <class A>
__device__ A normal_mass(A x) {
  return A(0.5) * (A(1) + erf(x * A(0.70710678118654752440)));
}

template <class A>
__device__ A activate(Activation kind, A x) {
  if (kind == Activation::kRelu) return x < A(0) ? A(0) : x;
  return x * (kind == Activation::kGelu ? normal_mass(x) : logistic(x));
}

template <class A>
__device__ A slope(Activation kind, A x) {
  if (kind == Activation::kRelu) return x <= A(0) ? A(0) : A(1);
  if (kind == Activation::kGelu) return normal_mass(x) + x * A(0.39894228040143267794) * exp(A(-0.5) * x * x);
  const A s = logistic(x);
  return s * (A(1) + x * (A(1) - s));
}

// f(place, column) of each V neighbours of a matrix
template <int V, class F>
__global__ void __launch_bounds__(kThreads) gated_fusion_kernel(const F f, int64_t size, int64_t columns) {
  const int64_t at = (blockIdx.x * int64_t(kThreads) + threadIdx.x) * V;
  if (at < size) f(at, at % columns);
}

// g(k) in the storage type for V neighbours
template <int V, class T, class G>
__device__ void put(T* to, const G& g) {
  Pack<T, V> out;
#pragma unroll
  for (int k = 0; k < V; ++k) from_acc(g(k), out.x + k);
  store_pack(to, out);
}

// u and v are the products of the two inputs; the activation overwrites u, its argument is written to `argument`
template <class T, int V>
struct Hidden {
  T* u;
  const T *v, *bias;
  T* argument;
  Activation kind;

  __device__ void operator()(int64_t at, int64_t column) const {
    const auto a = load_pack<V>(u + at), b = load_pack<V>(v + at), c = load_pack<V>(bias + column);
    acc_t<T> z[V];
#pragma unroll
    for (int k = 0; k < V; ++k) z[k] = to_acc(a.x[k]) + to_acc(b.x[k]) + to_acc(c.x[k]);
    if (argument != nullptr) put<V>(argument + at, [&](int k) { return z[k]; });
    put<V>(u + at, [&](int k) { return activate(kind, z[k]); });
  }
};

template <class T, int V>
struct Activated {
  const T* argument;
  T* hidden;
  Activation kind;

  __device__ void operator()(int64_t at, int64_t) const {
    const auto z = load_pack<V>(argument + at);
    put<V>(hidden + at, [&](int k) { return activate(kind, to_acc(z.x[k])); });
  }
};

// the result overwrites y
template <class T, int V>
struct Blend {
  T* y;
  const T *bias, *working, *episodic;

  __device__ void operator()(int64_t at, int64_t column) const {
    using A = acc_t<T>;
    const auto p = load_pack<V>(y + at), c = load_pack<V>(bias + column);
    const auto a = load_pack<V>(working + at), b = load_pack<V>(episodic + at);
    put<V>(y + at, [&](int k) {
      const A gate = logistic<A>(to_acc(p.x[k]) + to_acc(c.x[k]));
      return gate * to_acc(a.x[k]) + (A(1) - gate) * to_acc(b.x[k]);
    });
  }
};

// the gate's slope overwrites y; the direct gradients of the tokens are written if required
template <class T, int V>
struct GateSlope {
  T* y;
  const T *bias, *working, *episodic, *grad;
  T *to_working, *to_episodic;

  __device__ void operator()(int64_t at, int64_t column) const {
    using A = acc_t<T>;
    const auto p = load_pack<V>(y + at), c = load_pack<V>(bias + column), g = load_pack<V>(grad + at);
    const auto a = load_pack<V>(working + at), b = load_pack<V>(episodic + at);
    A gate[V], direct[V];
#pragma unroll
    for (int k = 0; k < V; ++k) {
      gate[k] = logistic<A>(to_acc(p.x[k]) + to_acc(c.x[k]));
      direct[k] = to_acc(g.x[k]) * gate[k];
    }
    if (to_working != nullptr) put<V>(to_working + at, [&](int k) { return direct[k]; });
    if (to_episodic != nullptr) put<V>(to_episodic + at, [&](int k) { return to_acc(g.x[k]) * (A(1) - gate[k]); });
    put<V>(y + at, [&](int k) { return (to_acc(a.x[k]) - to_acc(b.x[k])) * (direct[k] * (A(1) - gate[k])); });
  }
};

template <class T, int V>
struct HiddenSlope {
  T* grad;
  const T* argument;
  Activation kind;

  __device__ void operator()(int64_t at, int64_t) const {
    const auto g = load_pack<V>(grad + at), z = load_pack<V>(argument + at);
    put<V>(grad + at, [&](int k) { return to_acc(g.x[k]) * slope(kind, to_acc(z.x[k])); });
  }
};

template <class T, int V>
struct Add {
  T* to;
  const T* from;

  __device__ void operator()(int64_t at, int64_t) const {
    const auto a = load_pack<V>(to + at), b = load_pack<V>(from + at);
    put<V>(to + at, [&](int k) { return to_acc(a.x[k]) + to_acc(b.x[k]); });
  }
};

}  // namespace vmemory::fusion
