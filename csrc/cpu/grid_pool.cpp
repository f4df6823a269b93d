#include "common/pool.h"
#include "torch/stable.h"

namespace vmemory {
namespace {

template <class T>
void area(const T* in, T* out, int64_t H, int64_t W, int64_t h, int64_t w, int64_t D, int64_t row0, int64_t row1) {
  using A = acc_t<T>;
  constexpr int64_t L = kLanes<A>;
  for (int64_t row = row0; row < row1; ++row) {
    const int64_t b = row / h, i = row % h;
    const int64_t y0 = window_begin(i, H, h), y1 = window_end(i, H, h);
    for (int64_t j = 0; j < w; ++j) {
      const int64_t x0 = window_begin(j, W, w), x1 = window_end(j, W, w);
      const A scale = A(1) / static_cast<A>((y1 - y0) * (x1 - x0));
      T* to = out + (row * w + j) * D;
      for (int64_t d = 0; d < D; d += L) {
        const int64_t n = D - d < L ? D - d : L;
        vec<A> s{};
        for (int64_t y = y0; y < y1; ++y)
          for (int64_t x = x0; x < x1; ++x) {
            const T* from = in + ((b * H + y) * W + x) * D + d;
            s += n == L ? load(from) : load(from, n);
          }
        if (n == L) {
          store(to + d, s * scale);
        } else {
          store(to + d, s * scale, n);
        }
      }
    }
  }
}

Tensor grid_pool(const Tensor& tokens, Ints size, std::string mode) {
  const Tensor in = dense(tokens);
  const int64_t B = in.size(0), H = in.size(1), W = in.size(2), D = in.size(3), h = size[0], w = size[1];
  Tensor out = make(in, {B, h, w, D});
  dispatch_floating(in.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    const T* from = data<T>(in);
    T* to = mutable_data<T>(out);
    const int64_t work = H * W * D / h + 1;
    parallel(B * h, 32768 / work,
             [&](int64_t begin, int64_t end) { area(from, to, H, W, h, w, D, begin, end); });
  });
  return out;
}

}  // namespace
}  // namespace vmemory

STABLE_TORCH_LIBRARY_IMPL(vmemory, CPU, m) { m.impl("grid_pool", TORCH_BOX(&vmemory::grid_pool)); }
