// Exponential, logistic and error functions of vectors: exact to a few roundings, NaN and infinity kept.
#pragma once

#include <cmath>

#include "common/dot_tile.h"

namespace vmemory {

constexpr double kLog2E = 1.4426950408889634074;

template <class A>
inline vec<A> vmax(vec<A> a, vec<A> b) {  // b where a is not larger, also where a is NaN
  return a > b ? a : b;
}

template <int N, class A>
inline vec<A> polynomial(const A (&c)[N], vec<A> x) {
  vec<A> y = broadcast<A>(c[N - 1]);
  for (int i = N - 2; i >= 0; --i) y = multiply_add(y, x, broadcast<A>(c[i]));
  return y;
}

template <class A, class F>
inline vec<A> each_lane(vec<A> x, const F& f) {
  for (int64_t i = 0; i < kLanes<A>; ++i) x[i] = f(x[i]);
  return x;
}

inline vec<double> exp2(vec<double> x) {
  return each_lane<double>(x, [](double v) { return std::exp2(v); });
}

inline vec<float> exp2(vec<float> x) {
  // minimax polynomial on [-1/2, 1/2], relative error 2e-9
  static constexpr float c[] = {1.0f,           0.69314718246f,    0.24022646248f,   0.05550328642f,
                                0.00961848907f, 0.00133999309037f, 0.00015345808060f};
  // outside these bounds the results are infinity and zero; NaN passes both comparisons
  x = x > 160.0f ? broadcast(160.0f) : x;
  x = x < -160.0f ? broadcast(-160.0f) : x;
#if defined(__AVX512F__)
  const vec<float> n =
      reinterpret_cast<vec<float>>(_mm512_roundscale_ps(reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
  const vec<float> y = polynomial(c, x - n);
  return reinterpret_cast<vec<float>>(_mm512_scalef_ps(reinterpret_cast<__m512>(y), reinterpret_cast<__m512>(n)));
#else
  typedef int32_t ints __attribute__((vector_size(kVectorBytes)));
  constexpr float kRound = 12582912.0f;  // adding and subtracting it rounds to an integer
  const vec<float> n = (x + kRound) - kRound;
  const vec<float> y = polynomial(c, x - n);
  const ints whole = __builtin_convertvector(n, ints), half = whole >> 1;
  // in two steps, so that neither factor leaves the range of float
  const ints a = (half + 127) << 23, b = (whole - half + 127) << 23;
  return y * reinterpret_cast<vec<float>>(a) * reinterpret_cast<vec<float>>(b);
#endif
}

template <class A>
inline vec<A> exp(vec<A> x) {
  return exp2(x * A(kLog2E));
}

template <class A>
inline vec<A> sigmoid(vec<A> x) {
  return A(1) / (A(1) + exp<A>(-x));
}

inline vec<double> erf(vec<double> x) {
  return each_lane<double>(x, [](double v) { return std::erf(v); });
}

inline vec<float> erf(vec<float> x) {
  // minimax of erf(x) / x in x * x on [0, 1], and of log2(erfc) on [1, 4], past which erf is 1
  static constexpr float near[] = {1.12837910652f,    -0.37612625957f,     0.11283600330f,     -0.02685444430f,
                                   0.00518953520805f, -0.000802084105089f, 0.0000788911929703f};
  static constexpr float far[] = {-0.000510294106789f, -1.62597513199f,    -0.92076492310f,   -0.14865159988f,
                                  0.03145847097f,      -0.00424096919596f, 0.000267727969913f};
  vec<float> t = x < 0 ? -x : x;
  const vec<float> inner = x * polynomial(near, x * x);
  t = t > 4.0f ? broadcast(4.0f) : t;
  const vec<float> outer = 1.0f - exp2(polynomial(far, t));
  const vec<float> signed_outer = x < 0 ? -outer : outer;
  return t > 1.0f ? signed_outer : inner;
}

}  // namespace vmemory
