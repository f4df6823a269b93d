#include "contracts/grid_pool.h"
#include "cuda/device.h"
#include "grid_pool.cuh"

namespace vmemory::pool {
namespace {

Mode mode_of(const std::string& mode) {
  if (mode == "area") return Mode::kArea;
  if (mode == "bilinear") return Mode::kBilinear;
  return mode == "pixel_shuffle_v1" ? Mode::kShuffleTransposed : Mode::kShuffle;
}

bool is_shuffle(Mode mode) { return mode == Mode::kShuffle || mode == Mode::kShuffleTransposed; }

template <class... Parameters, class... Given>
void launch(const Device& device, void (*kernel)(Parameters...), int64_t blocks, Given... given) {
  VMEMORY_CHECK(blocks <= INT32_MAX, "tokens: too many rows for one launch");
  device.launch("grid_pool", kernel, dim3(static_cast<unsigned>(blocks)), kThreads, 0, given...);
}

// f(tag<T>, V) with the widest packs that channels and pointers allow
template <class F>
void with_packs(const Tensor& like, const Args& a, const F& f) {
  dispatch_floating(like.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    constexpr int V = sizeof(uint4) / sizeof(T);
    const auto both = reinterpret_cast<uintptr_t>(a.in) | reinterpret_cast<uintptr_t>(a.out);
    a.D % V == 0 && both % sizeof(uint4) == 0 ? f(t, std::integral_constant<int, V>{})
                                              : f(t, std::integral_constant<int, 1>{});
  });
}

Args args_of(const Tensor& in, const Ints& size) {
  Args a{};
  a.in = data<void>(in);
  a.B = in.size(0), a.H = in.size(1), a.W = in.size(2), a.D = in.size(3), a.h = size[0], a.w = size[1];
  return a;
}

Tensor make_pooled(const Tensor& in, Args& a, Mode mode) {
  Tensor out = make(in, {a.B, a.h, a.w, is_shuffle(mode) ? 4 * a.D : a.D});
  a.out = mutable_data<void>(out);
  return out;
}

void forward(const Device& device, const Tensor& in, const Args& a, Mode mode) {
  with_packs(in, a, [&](auto t, auto v) {
    using T = typename decltype(t)::type;
    constexpr int V = decltype(v)::value;
    if (is_shuffle(mode)) {
      launch(device, &shuffle_kernel<false, V, T>, a.B * a.H, a, mode == Mode::kShuffleTransposed);
    } else if (mode == Mode::kArea) {
      launch(device, &forward_kernel<Mode::kArea, V, T>, a.B * a.h, a);
    } else {
      launch(device, &forward_kernel<Mode::kBilinear, V, T>, a.B * a.h, a);
    }
  });
}

Tensor grid_pool(const Tensor& tokens, Ints size, std::string name) {
  contract::grid_pool(tokens, size, name);
  const Device device(tokens);
  const Tensor in = dense(tokens);
  const Mode mode = mode_of(name);
  Args a = args_of(in, size);
  Tensor out = make_pooled(in, a, mode);
  if (out.numel() > 0) forward(device, in, a, mode);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> grid_pool_stats(const Tensor& tokens, Ints size, std::string name) {
  contract::grid_pool(tokens, size, name);
  const Device device(tokens);
  const Tensor in = dense(tokens);
  const Mode mode = mode_of(name);
  Args a = args_of(in, size);
  const ScalarType wide = in.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor out = make_pooled(in, a, mode), mean = make(in, {a.B, a.D}, wide), norm = make(in, {a.B}, wide);
  a.mean = mutable_data<void>(mean);
  if (a.B == 0) return {out, mean, norm};
  if (a.D > 0) {
    if (is_shuffle(mode)) forward(device, in, a, mode);
    with_packs(in, a, [&](auto t, auto v) {
      using T = typename decltype(t)::type;
      constexpr int V = decltype(v)::value;
      constexpr int64_t kChannels = kRowPacks<V> * V;
      const int64_t blocks = a.B * ((a.D + kChannels - 1) / kChannels);
      if (is_shuffle(mode)) {
        launch(device, &stats_kernel<Mode::kShuffle, V, T>, blocks, a);
      } else if (mode == Mode::kArea) {
        launch(device, &stats_kernel<Mode::kArea, V, T>, blocks, a);
      } else {
        launch(device, &stats_kernel<Mode::kBilinear, V, T>, blocks, a);
      }
    });
  }
  if (wide == ScalarType::Double) {
    launch(device, &norm_kernel<double>, a.B, data<double>(mean), mutable_data<double>(norm), a.D);
  } else {
    launch(device, &norm_kernel<float>, a.B, data<float>(mean), mutable_data<float>(norm), a.D);
  }
  return {out, mean, norm};
}

Tensor grid_pool_backward(const Tensor& grad, std::optional<Tensor> cell_, Ints grid, std::string name) {
  contract::grid_pool_backward(grad, cell_, grid, name);
  const Device device(grad);
  const Tensor g = dense(grad), cell = cell_ ? dense(*cell_) : g;
  const Mode mode = mode_of(name);
  Args a = args_of(g, {g.size(1), g.size(2)});
  a.H = grid[0], a.W = grid[1], a.D = is_shuffle(mode) ? a.D / 4 : a.D;
  Tensor out = make(g, {a.B, a.H, a.W, a.D});
  a.out = mutable_data<void>(out);
  a.cell = cell_ ? data<void>(cell) : nullptr;
  if (out.numel() == 0) return out;
  with_packs(g, a, [&](auto t, auto v) {
    using T = typename decltype(t)::type;
    constexpr int V = decltype(v)::value;
    if (is_shuffle(mode)) {
      launch(device, &shuffle_kernel<true, V, T>, a.B * a.H, a, mode == Mode::kShuffleTransposed);
    } else if (mode == Mode::kArea) {
      launch(device, &backward_kernel<Mode::kArea, V, T>, a.B * a.H, a);
    } else {
      launch(device, &backward_kernel<Mode::kBilinear, V, T>, a.B * a.H, a);
    }
  });
  return out;
}

}  // namespace
}  // namespace vmemory::pool

VMEMORY_CUDA_IMPL(m) {
  m.impl("grid_pool", TORCH_BOX(&vmemory::pool::grid_pool));
  m.impl("grid_pool_stats", TORCH_BOX(&vmemory::pool::grid_pool_stats));
  m.impl("grid_pool_backward", TORCH_BOX(&vmemory::pool::grid_pool_backward));
}
