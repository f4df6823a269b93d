// Matrix products by the library that torch uses for them: MKL, oneDNN or cuBLAS.
#pragma once

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <array>
#include <cstdlib>
#include <cstring>

#include "torch/stable.h"

namespace vmemory {

inline Tensor turned(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }

inline Tensor columns_of(const Tensor& t, int64_t first, int64_t count) {
  Tensor whole = t;
  return torch::stable::narrow(whole, 1, first, count);
}

// out = a b, matrices of any strides, by the library torch uses for them
inline void product_into(const Tensor& out, const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  // the returned handle is ours to release
  torch::stable::detail::to<Tensor>(stack[0]);
  written(out);
}

// out = x w^T + b as torch.nn.functional.linear computes it: a 16-bit sum is rounded once, the bias in it. Autocast
// knows the form without `out`, and would change the dtype.
inline void linear_into(const Tensor& out, const Tensor& x, const Tensor& w, const Tensor& b) {
  std::array<StableIValue, 4> stack{torch::stable::detail::from(x), torch::stable::detail::from(w),
                                    torch::stable::detail::from(std::optional<Tensor>(b)),
                                    torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

// Whether torch multiplies 16-bit matrices in the tiles of AMX, which no code of ours uses.
inline bool has_amx() {
#if defined(__x86_64__) && defined(__AVX512BW__)
  static const bool found = [] {
    // what holds oneDNN to older instructions holds torch to them
    const char* limit = std::getenv("ONEDNN_MAX_CPU_ISA");
    if (limit != nullptr && std::strstr(limit, "AMX") == nullptr && std::strcmp(limit, "DEFAULT") != 0) return false;
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1);
  }();
  return found;
#else
  return false;
#endif
}

// Whether the library multiplies matrices of T faster than tiles of ours: always but in 16 bits without AMX.
template <class T>
bool multiplied_by_library() {
  return sizeof(T) > 2 || has_amx();
}

// [n, 2 D] of two [n, D]
template <class T>
Tensor side_by_side(const Tensor& left, const Tensor& right) {
  const int64_t n = left.size(0), D = left.size(1);
  Tensor both = make(left, {n, 2 * D});
  const T* from[] = {data<T>(left), data<T>(right)};
  T* to = mutable_data<T>(both);
  parallel_bytes(n, 4 * n * D * int64_t(sizeof(T)), [&](int64_t begin, int64_t end) {
    for (int64_t half = 2 * begin; half < 2 * end; ++half)
      std::memcpy(to + half * D, from[half % 2] + half / 2 * D, D * sizeof(T));
  });
  return both;
}

// f(at, lanes) for every vector of `size` elements, in matrices of which `matrices` are read or written
template <class T, class F>
void for_vectors(int64_t size, int64_t matrices, const F& f) {
  constexpr int64_t L = kLanes<acc_t<T>>;
  const int64_t vectors = (size + L - 1) / L;
  parallel_bytes(vectors, matrices * size * int64_t(sizeof(T)), [&](int64_t begin, int64_t end) {
    for (int64_t at = begin * L; at < std::min(end * L, size); at += L) f(at, std::min(L, size - at));
  });
}

}  // namespace vmemory
