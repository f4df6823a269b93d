#include "contracts/gated_fusion.h"
#include "cuda/device.h"
#include "gated_fusion.cuh"
#include "torch/products.h"

namespace vmemory::fusion {
namespace {

// cuBLAS computes the products, through torch. The rest is memory traffic, and each pass below reads and writes once.
// float32 and float64 only: the two products that make up the hidden layer are rounded before they are added.
struct Call {
  const Device& device;
  const Tensor& like;
  int64_t columns;
  bool aligned = true;

  Call& touches(const Tensor& t) {
    if (t.numel() > 0) aligned = aligned && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % sizeof(uint4) == 0;
    return *this;
  }

  // make(tag<T>, std::integral_constant<int, V>) returns the functor that is called for every element
  template <class Make>
  void run(int64_t size, const Make& make) const {
    if (size == 0) return;
    const auto launch_all = [&](auto type) {
      using T = typename decltype(type)::type;
      constexpr int kWide = sizeof(uint4) / sizeof(T);
      const auto launch = [&](auto v) {
        constexpr int V = decltype(v)::value;
        const auto f = make(type, v);
        const int64_t blocks = (size / V + kThreads - 1) / kThreads;
        device.launch("gated_fusion", &gated_fusion_kernel<V, decltype(f)>, dim3(static_cast<unsigned>(blocks)),
                      kThreads, 0, f, size, columns);
      };
      if (aligned && columns % kWide == 0) {
        launch(std::integral_constant<int, kWide>{});
      } else {
        launch(std::integral_constant<int, 1>{});
      }
    };
    like.scalar_type() == ScalarType::Double ? launch_all(tag<double>{}) : launch_all(tag<float>{});
  }
};

void check_dtype(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  VMEMORY_CHECK(type == ScalarType::Float || type == ScalarType::Double, "working: expected float32 or float64");
}

Activation named(const std::string& name) {
  return name == "relu" ? Activation::kRelu : name == "gelu" ? Activation::kGelu : Activation::kSilu;
}

template <class T>
T* place(const Tensor& t) {
  return t.numel() > 0 ? mutable_data<T>(t) : nullptr;
}

std::tuple<Tensor, Tensor> gated_fusion(const Tensor& working_, const Tensor& episodic_, const Tensor& w1,
                                        const Tensor& b1_, const Tensor& w2, const Tensor& b2_, std::string activation,
                                        bool save) {
  contract::gated_fusion(working_, episodic_, w1, b1_, w2, b2_, activation);
  check_dtype(working_);
  const Device device(working_);
  const Tensor working = dense(working_), episodic = dense(episodic_), b1 = dense(b1_), b2 = dense(b2_);
  const int64_t n = working.size(0), D = working.size(1), H = w1.size(0);
  const Activation kind = named(activation);
  const bool keep_argument = save && kind != Activation::kRelu;
  Tensor hidden = make(working, {n, H}), other = make(working, {n, H}), out = make(working, {n, D});
  product_into(hidden, working, turned(columns_of(w1, 0, D)));
  product_into(other, episodic, turned(columns_of(w1, D, D)));
  Call{device, working, H}.touches(hidden).touches(other).touches(b1).run(n * H, [&](auto type, auto v) {
    using T = typename decltype(type)::type;
    return Hidden<T, v()>{mutable_data<T>(hidden), data<T>(other), data<T>(b1),
                          keep_argument ? mutable_data<T>(other) : nullptr, kind};
  });
  product_into(out, hidden, turned(w2));
  Call{device, working, D}.touches(out).touches(b2).touches(working).touches(episodic).run(
      n * D, [&](auto type, auto v) {
        using T = typename decltype(type)::type;
        return Blend<T, v()>{mutable_data<T>(out), data<T>(b2), data<T>(working), data<T>(episodic)};
      });
  return {out, keep_argument ? other : save ? hidden : make(working, {0})};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_fusion_backward(
    const Tensor& grad_, const Tensor& working_, const Tensor& episodic_, const Tensor& w1, const Tensor& w2,
    const Tensor& b2_, const Tensor& saved_, std::string activation, bool for_working, bool for_episodic, bool for_w1,
    bool for_b1, bool for_w2, bool for_b2) {
  contract::gated_fusion_backward(grad_, working_, episodic_, w1, w2, b2_, saved_, activation);
  check_dtype(working_);
  const Device device(working_);
  const Tensor grad = dense(grad_), working = dense(working_), episodic = dense(episodic_), b2 = dense(b2_);
  const Tensor saved = dense(saved_);
  const int64_t n = working.size(0), D = working.size(1), H = w1.size(0);
  const Activation kind = named(activation);
  const auto room = [&](bool wanted, Ints sizes) { return make(working, wanted ? sizes : Ints{0}); };
  Tensor grad_working = room(for_working, {n, D}), grad_episodic = room(for_episodic, {n, D});
  Tensor grad_w1 = room(for_w1, {H, 2 * D}), grad_w2 = room(for_w2, {D, H});
  Tensor grad_b1 = room(false, {}), grad_b2 = room(false, {});
  Tensor hidden = saved;
  if (kind != Activation::kRelu) {
    hidden = make(working, {n, H});
    Call{device, working, H}.touches(saved).touches(hidden).run(n * H, [&](auto type, auto v) {
      using T = typename decltype(type)::type;
      return Activated<T, v()>{data<T>(saved), mutable_data<T>(hidden), kind};
    });
  }
  Tensor gate = make(working, {n, D});
  product_into(gate, hidden, turned(w2));
  Call call{device, working, D};
  call.touches(gate).touches(b2).touches(working).touches(episodic).touches(grad);
  call.touches(grad_working).touches(grad_episodic).run(n * D, [&](auto type, auto v) {
    using T = typename decltype(type)::type;
    return GateSlope<T, v()>{mutable_data<T>(gate),  data<T>(b2),   data<T>(working),
                             data<T>(episodic),      data<T>(grad), place<T>(grad_working),
                             place<T>(grad_episodic)};
  });
  if (for_w2) product_into(grad_w2, turned(gate), hidden);
  const Ints over_tokens{0};
  if (for_b2) grad_b2 = torch::stable::sum(gate, over_tokens);
  if (!(for_working || for_episodic || for_w1 || for_b1))
    return {grad_working, grad_episodic, grad_w1, grad_b1, grad_w2, grad_b2};

  Tensor slopes = make(working, {n, H});
  product_into(slopes, gate, w2);
  Call{device, working, H}.touches(slopes).touches(saved).run(n * H, [&](auto type, auto v) {
    using T = typename decltype(type)::type;
    return HiddenSlope<T, v()>{mutable_data<T>(slopes), data<T>(saved), kind};
  });
  const auto into_tokens = [&](const Tensor& to, int64_t first) {
    // the gate's slope is not needed any more
    product_into(gate, slopes, columns_of(w1, first, D));
    Call{device, working, D}.touches(to).touches(gate).run(n * D, [&](auto type, auto v) {
      using T = typename decltype(type)::type;
      return Add<T, v()>{mutable_data<T>(to), data<T>(gate)};
    });
  };
  if (for_working) into_tokens(grad_working, 0);
  if (for_episodic) into_tokens(grad_episodic, D);
  if (for_w1) {
    product_into(columns_of(grad_w1, 0, D), turned(slopes), working);
    product_into(columns_of(grad_w1, D, D), turned(slopes), episodic);
  }
  if (for_b1) grad_b1 = torch::stable::sum(slopes, over_tokens);
  return {grad_working, grad_episodic, grad_w1, grad_b1, grad_w2, grad_b2};
}

}  // namespace
}  // namespace vmemory::fusion

VMEMORY_CUDA_IMPL(m) {
  m.impl("gated_fusion", TORCH_BOX(&vmemory::fusion::gated_fusion));
  m.impl("gated_fusion_backward", TORCH_BOX(&vmemory::fusion::gated_fusion_backward));
}
