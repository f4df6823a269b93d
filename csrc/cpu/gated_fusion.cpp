#include "contracts/gated_fusion.h"

#include "common/activation.h"
#include "common/token_panel.h"
#include "torch/products.h"

namespace vmemory {
namespace {

struct Sizes {
  int64_t n, D, H;
};

template <class T>
struct Arguments {
  const T *working, *episodic, *w1, *b1, *w2, *b2;
  T *out, *hidden;
};

template <Activation kKind, bool kPairs, class T>
void fuse(const Arguments<T>& x, const Sizes& z) {
  using A = acc_t<T>;
  // for the backward pass: relu's slope follows from its value, other activations need their argument
  const bool keep_argument = x.hidden != nullptr && kKind != Activation::kRelu;
  const TokenBlocks<A> blocks(z.n, torch::stable::get_num_threads());
  const auto run = [&](int64_t at, int64_t tokens, int64_t vectors) {
    const Panel<T, kPairs> input(2 * z.D, vectors), hidden(z.H, vectors);
    input.read(x.working + at * z.D, tokens, z.D, 0);
    input.read(x.episodic + at * z.D, tokens, z.D, z.D);
    for_products(x.w1, x.b1, z.H, 2 * z.D, input, [&](int64_t c, int64_t t, vec<A> u, vec<A> v) {
      keep_argument ? hidden.put(c, t, u, v) : hidden.put(c, t, activate<kKind, A>(u), activate<kKind, A>(v));
    });
    if (x.hidden != nullptr) hidden.write(x.hidden + at * z.H, tokens, z.H, 0);
    if (keep_argument)
      hidden.for_pairs(z.H, [&](int64_t c, int64_t t, int64_t next) {
        hidden.put(c, t, activate<kKind, A>(hidden.get(c, t)), activate<kKind, A>(hidden.get(next, t)));
      });
    // the result overwrites the working tokens, which are not read again
    for_products(x.w2, x.b2, z.D, z.H, hidden, [&](int64_t c, int64_t t, vec<A> u, vec<A> v) {
      const auto blend = [&](int64_t channel, vec<A> y) {
        const vec<A> gate = logistic<A>(y);
        return gate * input.get(channel, t) + (A(1) - gate) * input.get(channel + z.D, t);
      };
      const vec<A> first = blend(c, u);
      input.put(c, t, first, kPairs ? blend(c + 1, v) : first);
    });
    input.write(x.out + at * z.D, tokens, z.D, 0);
  };
  parallel(blocks.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) blocks.visit(block, run);
  });
}

// The same with the products of torch's library between passes over memory.
template <Activation kKind, class T>
std::tuple<Tensor, Tensor> fuse_products(const Tensor& working, const Tensor& episodic, const Tensor& w1,
                                         const Tensor& b1, const Tensor& w2, const Tensor& b2, bool save) {
  using A = acc_t<T>;
  const int64_t n = working.size(0), D = working.size(1), H = w1.size(0);
  // one product over the channels of both, so that 16-bit sums are rounded once
  const Tensor argument = make(working, {n, H}), out = make(working, {n, D});
  linear_into(argument, side_by_side<T>(working, episodic), w1, b1);
  const bool keep_argument = save && kKind != Activation::kRelu;
  const Tensor hidden = keep_argument ? make(working, {n, H}) : argument;
  const T *x = data<T>(argument), *a = data<T>(working), *b = data<T>(episodic);
  T* h = mutable_data<T>(hidden);
  for_vectors<T>(n * H, 2, [&](int64_t at, int64_t lanes) {
    store_some(h + at, activate<kKind, A>(load_some(x + at, lanes)), lanes);
  });
  linear_into(out, hidden, w2, b2);
  T* y = mutable_data<T>(out);
  for_vectors<T>(n * D, 4, [&](int64_t at, int64_t lanes) {
    const vec<A> gate = logistic<A>(load_some(y + at, lanes));
    store_some(y + at, gate * load_some(a + at, lanes) + (A(1) - gate) * load_some(b + at, lanes), lanes);
  });
  return {out, save ? argument : make(working, {0})};
}

std::tuple<Tensor, Tensor> gated_fusion(const Tensor& working_, const Tensor& episodic_, const Tensor& w1_,
                                        const Tensor& b1_, const Tensor& w2_, const Tensor& b2_, std::string activation,
                                        bool save) {
  contract::gated_fusion(working_, episodic_, w1_, b1_, w2_, b2_, activation);
  const Tensor working = dense(working_), episodic = dense(episodic_), w1 = dense(w1_), b1 = dense(b1_);
  const Tensor w2 = dense(w2_), b2 = dense(b2_);
  const Sizes z{working.size(0), working.size(1), w1.size(0)};
  std::tuple<Tensor, Tensor> result(working, working);
  dispatch_floating(working.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    dispatch_activation(activation, [&](auto kind) {
      if (multiplied_by_library<T>()) {
        result = fuse_products<kind(), T>(working, episodic, w1, b1, w2, b2, save);
        return;
      }
      if constexpr (sizeof(T) == 2) {
        const Tensor out = make(working, {z.n, z.D}), hidden = make(working, save ? Ints{z.n, z.H} : Ints{0});
        const Arguments<T> x{
            data<T>(working), data<T>(episodic), data<T>(w1),          data<T>(b1),
            data<T>(w2),      data<T>(b2),       mutable_data<T>(out), save ? mutable_data<T>(hidden) : nullptr};
        result = {out, hidden};
        if constexpr (std::is_same_v<T, bf16>)
          if (has_pair_products() && z.D % 2 == 0 && z.H % 2 == 0) return fuse<kind(), true>(x, z);
        fuse<kind(), false>(x, z);
      }
    });
  });
  return result;
}

}  // namespace
}  // namespace vmemory

STABLE_TORCH_LIBRARY_IMPL(vmemory, CPU, m) { m.impl("gated_fusion", TORCH_BOX(&vmemory::gated_fusion)); }
