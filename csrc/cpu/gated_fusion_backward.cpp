#include "common/activation.h"
#include "common/token_panel.h"
#include "contracts/gated_fusion.h"
#include "torch/products.h"

namespace vmemory {
namespace {

struct Sizes {
  int64_t n, D, H;
  // the length of a row of all tokens: whole vectors, zero past the last token
  int64_t padded() const { return round_up(n, kLanes<float>); }
};

// Null if not required. gate_slope [D, padded] and hidden_slope [H, padded] are the gradients of the arguments of the
// sigmoid and of the activation.
template <class T>
struct Arguments {
  const T *grad, *working, *episodic, *w2, *b2, *hidden, *w1_turned, *w2_turned;
  T *gate_slope, *hidden_slope, *grad_working, *grad_episodic;
};

template <class T>
void turn(const T* from, int64_t rows, int64_t columns, T* to) {
  using A = acc_t<T>;
  constexpr int64_t L = kLanes<A>;
  parallel((columns + L - 1) / L, 4, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin * L; c < std::min(end * L, columns); c += L)
      for (int64_t r = 0; r < rows; r += L) {
        const int64_t across = std::min(L, columns - c), down = std::min(L, rows - r);
        vec<A> square[L];
        for (int64_t i = 0; i < L; ++i)
          square[i] = i < down ? load_some(from + (r + i) * columns + c, across) : vec<A>{};
        transpose<A>(square);
        for (int64_t i = 0; i < across; ++i) store_some(to + (c + i) * rows + r, square[i], down);
      }
  });
}

// one block's columns of a matrix with a row of all tokens per channel
template <class T, bool kPairs>
void keep(const Panel<T, kPairs>& panel, int64_t channels, int64_t at, int64_t tokens, const Sizes& z, T* to) {
  constexpr int64_t L = kLanes<acc_t<T>>;
  for (int64_t c = 0; c < channels; ++c) {
    T* row = to + c * z.padded();
    for (int64_t t = 0; t < tokens; t += L) store_some(row + at + t, panel.get(c, t), std::min(L, tokens - t));
    if (at + tokens == z.n) std::fill(row + z.n, row + z.padded(), T{});
  }
}

template <Activation kKind, bool kPairs, class T>
void into_tokens(const Arguments<T>& x, const Sizes& z) {
  using A = acc_t<T>;
  const T* no_bias = nullptr;
  const bool for_tokens = x.grad_working != nullptr || x.grad_episodic != nullptr;
  const TokenBlocks<A> blocks(z.n, torch::stable::get_num_threads());
  const auto run = [&](int64_t at, int64_t tokens, int64_t vectors) {
    const Panel<T, kPairs> input(2 * z.D, vectors), grad(z.D, vectors), argument(z.H, vectors);
    const Panel<T, kPairs> activated(kKind == Activation::kRelu ? 0 : z.H, vectors);
    input.read(x.working + at * z.D, tokens, z.D, 0);
    input.read(x.episodic + at * z.D, tokens, z.D, z.D);
    grad.read(x.grad + at * z.D, tokens, z.D, 0);
    argument.read(x.hidden + at * z.H, tokens, z.H, 0);
    if constexpr (kKind != Activation::kRelu)
      argument.for_pairs(z.H, [&](int64_t c, int64_t t, int64_t next) {
        activated.put(c, t, activate<kKind, A>(argument.get(c, t)), activate<kKind, A>(argument.get(next, t)));
      });
    // the gate is computed again, not stored; its gradient overwrites the result's, and the tokens' direct gradient
    // overwrites the tokens
    const auto& hidden = kKind == Activation::kRelu ? argument : activated;
    for_products(x.w2, x.b2, z.D, z.H, hidden, [&](int64_t c, int64_t t, vec<A> u, vec<A> v) {
      vec<A> direct[2], other[2], slope[2];
      for (int i = 0; i < grad.kStack; ++i) {
        const vec<A> g = grad.get(c + i, t), gate = logistic<A>(i ? v : u);
        direct[i] = g * gate, other[i] = g * (A(1) - gate);
        slope[i] = (input.get(c + i, t) - input.get(c + i + z.D, t)) * (direct[i] * (A(1) - gate));
      }
      constexpr int kLast = kPairs ? 1 : 0;
      grad.put(c, t, slope[0], slope[kLast]);
      input.put(c, t, direct[0], direct[kLast]);
      input.put(c + z.D, t, other[0], other[kLast]);
    });
    if (x.gate_slope != nullptr) keep(grad, z.D, at, tokens, z, x.gate_slope);
    if (x.hidden_slope != nullptr || for_tokens)
      for_products(x.w2_turned, no_bias, z.H, z.D, grad, [&](int64_t c, int64_t t, vec<A> u, vec<A> v) {
        const auto slope = [&](int64_t channel) { return activation_slope<kKind, A>(argument.get(channel, t)); };
        const vec<A> first = u * slope(c);
        argument.put(c, t, first, kPairs ? v * slope(c + 1) : first);
      });
    if (x.hidden_slope != nullptr) keep(argument, z.H, at, tokens, z, x.hidden_slope);
    const auto finish = [&](T* out, int64_t from) {
      if (out == nullptr) return;
      const T* weight = x.w1_turned + from * z.H;
      for_products(weight, no_bias, z.D, z.H, argument, [&](int64_t c, int64_t t, vec<A> u, vec<A> v) {
        const vec<A> first = input.get(c + from, t) + u;
        input.put(c + from, t, first, kPairs ? input.get(c + from + 1, t) + v : first);
      });
      input.write(out + at * z.D, tokens, z.D, from);
    };
    finish(x.grad_working, 0), finish(x.grad_episodic, z.D);
  };
  parallel(blocks.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) blocks.visit(block, run);
  });
}

// out [rows, columns], with rows `step` apart, = slope [rows, padded] times f(tokens [n, columns])
template <bool kPairs, class T, class F>
void into_weight(const T* slope, int64_t rows, const T* from, int64_t columns, const Sizes& z, T* out, int64_t step,
                 const F& f) {
  using A = acc_t<T>;
  const TokenBlocks<A> blocks(columns, torch::stable::get_num_threads());
  const auto run = [&](int64_t at, int64_t width, int64_t vectors) {
    // tokens are rows here, and the weight's columns lie side by side
    const Panel<T, kPairs> panel(z.padded(), vectors);
    panel.for_pairs(z.padded(), [&](int64_t token, int64_t c, int64_t next) {
      const int64_t lanes = std::min(kLanes<A>, width - c);
      const auto row = [&](int64_t i) { return i < z.n ? f(load_some(from + i * columns + at + c, lanes)) : vec<A>{}; };
      const vec<A> first = row(token);
      panel.put(token, c, first, kPairs ? row(next) : first);
    });
    const T* no_bias = nullptr;
    for_products(slope, no_bias, rows, z.padded(), panel, [&](int64_t r, int64_t c, vec<A> u, vec<A> v) {
      const int64_t lanes = std::min(kLanes<A>, width - c);
      store_some(out + r * step + at + c, u, lanes);
      if (kPairs) store_some(out + (r + 1) * step + at + c, v, lanes);
    });
  };
  parallel(blocks.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) blocks.visit(block, run);
  });
}

template <class T>
void into_bias(const T* slope, int64_t rows, const Sizes& z, T* out) {
  using A = acc_t<T>;
  parallel(rows, (1 << 15) / (z.padded() + 1), [&](int64_t begin, int64_t end) {
    LevelSum<A> total(kLanes<A>);
    for (int64_t r = begin; r < end; ++r) {
      total.reset(kLanes<A>);
      for (int64_t t = 0; t < z.padded(); t += kLanes<A>)
        total.add(0, load(slope + r * z.padded() + t), kLanes<A>), total.close();
      store(out + r, broadcast(sum<A>(total.total(0, kLanes<A>))), 1);
    }
  });
}

template <Activation kKind, bool kPairs, class T>
void into_weights(const Arguments<T>& x, const Sizes& z, T* grad_w1, T* grad_b1, T* grad_w2, T* grad_b2) {
  using A = acc_t<T>;
  const auto as_it_is = [](vec<A> v) { return v; };
  if (grad_w1 != nullptr) {
    into_weight<kPairs>(x.hidden_slope, z.H, x.working, z.D, z, grad_w1, 2 * z.D, as_it_is);
    into_weight<kPairs>(x.hidden_slope, z.H, x.episodic, z.D, z, grad_w1 + z.D, 2 * z.D, as_it_is);
  }
  if (grad_w2 != nullptr)
    into_weight<kPairs>(x.gate_slope, z.D, x.hidden, z.H, z, grad_w2, z.H, [](vec<A> v) {
      if constexpr (kKind == Activation::kRelu) return v;
      return activate<kKind, A>(v);
    });
  if (grad_b1 != nullptr) into_bias(x.hidden_slope, z.H, z, grad_b1);
  if (grad_b2 != nullptr) into_bias(x.gate_slope, z.D, z, grad_b2);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

struct Wanted {
  bool working, episodic, w1, b1, w2, b2;
};

// The same with the products of torch's library between passes over memory.
template <Activation kKind, class T>
Gradients by_products(const Tensor& grad, const Tensor& working, const Tensor& episodic, const Tensor& w1,
                      const Tensor& w2, const Tensor& b2, const Tensor& saved, const Wanted& wanted) {
  using A = acc_t<T>;
  const int64_t n = working.size(0), D = working.size(1), H = w1.size(0);
  const auto room = [&](bool is_wanted, Ints sizes) { return make(working, is_wanted ? sizes : Ints{0}); };
  Tensor grad_working = room(wanted.working, {n, D}), grad_episodic = room(wanted.episodic, {n, D});
  Tensor grad_w1 = room(wanted.w1, {H, 2 * D}), grad_w2 = room(wanted.w2, {D, H});
  Tensor grad_b1 = room(false, {}), grad_b2 = room(false, {});
  const T *argument = data<T>(saved), *a = data<T>(working), *b = data<T>(episodic), *g = data<T>(grad);
  Tensor hidden = saved;
  if constexpr (kKind != Activation::kRelu) {
    hidden = make(working, {n, H});
    T* h = mutable_data<T>(hidden);
    for_vectors<T>(n * H, 2, [&](int64_t at, int64_t lanes) {
      store_some(h + at, activate<kKind, A>(load_some(argument + at, lanes)), lanes);
    });
  }
  const Tensor slope = make(working, {n, D});
  linear_into(slope, hidden, w2, b2);
  T* s = mutable_data<T>(slope);
  T* to_working = wanted.working ? mutable_data<T>(grad_working) : nullptr;
  T* to_episodic = wanted.episodic ? mutable_data<T>(grad_episodic) : nullptr;
  for_vectors<T>(n * D, 6, [&](int64_t at, int64_t lanes) {
    const vec<A> gate = logistic<A>(load_some(s + at, lanes));
    const vec<A> up = load_some(g + at, lanes), direct = up * gate;
    const vec<A> difference = load_some(a + at, lanes) - load_some(b + at, lanes);
    store_some(s + at, difference * (direct * (A(1) - gate)), lanes);
    if (to_working) store_some(to_working + at, direct, lanes);
    if (to_episodic) store_some(to_episodic + at, up * (A(1) - gate), lanes);
  });
  if (wanted.w2) product_into(grad_w2, turned(slope), hidden);
  const Ints over_tokens{0};
  if (wanted.b2) grad_b2 = torch::stable::sum(slope, over_tokens);
  const bool for_tokens = wanted.working || wanted.episodic;
  if (!(for_tokens || wanted.w1 || wanted.b1)) return {grad_working, grad_episodic, grad_w1, grad_b1, grad_w2, grad_b2};

  Tensor inner = make(working, {n, H});
  product_into(inner, slope, w2);
  T* i = mutable_data<T>(inner);
  for_vectors<T>(n * H, 3, [&](int64_t at, int64_t lanes) {
    store_some(i + at, load_some(i + at, lanes) * activation_slope<kKind, A>(load_some(argument + at, lanes)), lanes);
  });
  const auto add_through = [&](T* to, int64_t first) {
    if (to == nullptr) return;
    // the slope of the gate is not needed any more
    product_into(slope, inner, columns_of(w1, first, D));
    for_vectors<T>(n * D, 3, [&](int64_t at, int64_t lanes) {
      store_some(to + at, load_some(to + at, lanes) + load_some(s + at, lanes), lanes);
    });
  };
  add_through(to_working, 0), add_through(to_episodic, D);
  if (wanted.w1) product_into(grad_w1, turned(inner), side_by_side<T>(working, episodic));
  if (wanted.b1) grad_b1 = torch::stable::sum(inner, over_tokens);
  return {grad_working, grad_episodic, grad_w1, grad_b1, grad_w2, grad_b2};
}

// The same in blocks of tokens that stay in the cache.
template <class T>
Gradients by_tiles(const Tensor& grad, const Tensor& working, const Tensor& episodic, const Tensor& w1,
                   const Tensor& w2, const Tensor& b2, const Tensor& hidden, const std::string& activation,
                   const Wanted& wanted) {
  const Sizes z{working.size(0), working.size(1), w1.size(0)};
  const bool for_tokens = wanted.working || wanted.episodic, past_gate = for_tokens || wanted.w1 || wanted.b1;
  const auto room = [&](bool is_wanted, Ints sizes) { return make(working, is_wanted ? sizes : Ints{0}); };
  Tensor grad_working = room(wanted.working, {z.n, z.D}), grad_episodic = room(wanted.episodic, {z.n, z.D});
  Tensor grad_w1 = room(wanted.w1, {z.H, 2 * z.D}), grad_b1 = room(wanted.b1, {z.H});
  Tensor grad_w2 = room(wanted.w2, {z.D, z.H}), grad_b2 = room(wanted.b2, {z.D});
  Tensor gate_slope = room(wanted.w2 || wanted.b2, {z.D, z.padded()});
  Tensor hidden_slope = room(wanted.w1 || wanted.b1, {z.H, z.padded()});
  Tensor w1_turned = room(for_tokens, {2 * z.D, z.H}), w2_turned = room(past_gate, {z.H, z.D});
  const auto place = [](bool is_wanted, const Tensor& x) { return is_wanted ? mutable_data<T>(x) : nullptr; };
  if (for_tokens) turn(data<T>(w1), z.H, 2 * z.D, mutable_data<T>(w1_turned));
  if (past_gate) turn(data<T>(w2), z.D, z.H, mutable_data<T>(w2_turned));
  const Arguments<T> x{data<T>(grad),
                       data<T>(working),
                       data<T>(episodic),
                       data<T>(w2),
                       data<T>(b2),
                       data<T>(hidden),
                       data<T>(w1_turned),
                       data<T>(w2_turned),
                       place(wanted.w2 || wanted.b2, gate_slope),
                       place(wanted.w1 || wanted.b1, hidden_slope),
                       place(wanted.working, grad_working),
                       place(wanted.episodic, grad_episodic)};
  const auto run = [&](auto kind, auto pairs) {
    into_tokens<kind(), pairs()>(x, z);
    into_weights<kind(), pairs()>(x, z, place(wanted.w1, grad_w1), place(wanted.b1, grad_b1), place(wanted.w2, grad_w2),
                                  place(wanted.b2, grad_b2));
  };
  dispatch_activation(activation, [&](auto kind) {
    if constexpr (std::is_same_v<T, bf16>)
      if (has_pair_products() && z.D % 2 == 0 && z.H % 2 == 0) return run(kind, std::true_type{});
    run(kind, std::false_type{});
  });
  return {grad_working, grad_episodic, grad_w1, grad_b1, grad_w2, grad_b2};
}

Gradients gated_fusion_backward(const Tensor& grad_, const Tensor& working_, const Tensor& episodic_, const Tensor& w1_,
                                const Tensor& w2_, const Tensor& b2_, const Tensor& hidden_, std::string activation,
                                bool for_working, bool for_episodic, bool for_w1, bool for_b1, bool for_w2,
                                bool for_b2) {
  contract::gated_fusion_backward(grad_, working_, episodic_, w1_, w2_, b2_, hidden_, activation);
  const Tensor grad = dense(grad_), working = dense(working_), episodic = dense(episodic_), w1 = dense(w1_);
  const Tensor w2 = dense(w2_), b2 = dense(b2_), hidden = dense(hidden_);
  const Wanted wanted{for_working, for_episodic, for_w1, for_b1, for_w2, for_b2};
  std::optional<Gradients> result;
  dispatch_floating(working.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    if (multiplied_by_library<T>()) {
      dispatch_activation(activation, [&](auto kind) {
        result = by_products<kind(), T>(grad, working, episodic, w1, w2, b2, hidden, wanted);
      });
    } else if constexpr (sizeof(T) == 2) {
      result = by_tiles<T>(grad, working, episodic, w1, w2, b2, hidden, activation, wanted);
    }
  });
  return *result;
}

}  // namespace
}  // namespace vmemory

STABLE_TORCH_LIBRARY_IMPL(vmemory, CPU, m) {
  m.impl("gated_fusion_backward", TORCH_BOX(&vmemory::gated_fusion_backward));
}
