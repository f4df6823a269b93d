// Activation functions of vectors and their derivatives; NaN stays NaN.
#pragma once

#include <string>

#include "common/math.h"

namespace vmemory {

enum class Activation { kRelu, kGelu, kSilu };

// f(std::integral_constant<Activation, ...>) for a name; the public op has checked it
template <class F>
void dispatch_activation(const std::string& name, const F& f) {
  if (name == "relu") return f(std::integral_constant<Activation, Activation::kRelu>{});
  if (name == "gelu") return f(std::integral_constant<Activation, Activation::kGelu>{});
  f(std::integral_constant<Activation, Activation::kSilu>{});
}

// exp with a correction of the rounding of x times log2(e), whose error grows with x, and with it the slope of a nearly
// closed gate
template <class A>
inline vec<A> exp_of(vec<A> x) {
  constexpr A kHigh = A(kLog2E), kLow = A(kLog2E - double(kHigh));
  const vec<A> whole = x * kHigh;
  const vec<A> rest = multiply_add(x, broadcast<A>(kHigh), -whole) + x * kLow;
  const vec<A> y = exp2(whole), more = y * (rest * A(0.69314718055994530942));
  // outside the range of A the correction is not defined
  return whole < A(-120) || whole > A(120) ? y : y + more;
}

template <class A>
inline vec<A> logistic(vec<A> x) {
  return A(1) / (A(1) + exp_of<A>(-x));
}

// the factor of x in gelu: the normal distribution's mass below x
template <class A>
inline vec<A> normal_mass(vec<A> x) {
  return A(0.5) * (A(1) + erf(x * A(0.70710678118654752440)));
}

template <Activation kKind, class A>
inline vec<A> activate(vec<A> x) {
  if constexpr (kKind == Activation::kRelu) return x < 0 ? vec<A>{} : x;
  if constexpr (kKind == Activation::kGelu) return x * normal_mass<A>(x);
  if constexpr (kKind == Activation::kSilu) return x * logistic<A>(x);
}

template <Activation kKind, class A>
inline vec<A> activation_slope(vec<A> x) {
  if constexpr (kKind == Activation::kRelu) return x <= 0 ? vec<A>{} : broadcast<A>(1);
  if constexpr (kKind == Activation::kGelu)
    return normal_mass<A>(x) + x * A(0.39894228040143267794) * exp_of<A>(A(-0.5) * x * x);
  if constexpr (kKind == Activation::kSilu) {
    const vec<A> s = logistic<A>(x);
    return s * (A(1) + x * (A(1) - s));
  }
}

}  // namespace vmemory
