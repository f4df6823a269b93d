#include <map>

#include "common/grid.h"
#include "contracts/grid_pool.h"
#include "torch/stable.h"

namespace vmemory {
namespace {

// where each frame's pooled rows and tokens lie, and the map of its size
template <class A>
struct Plan {
  std::vector<int64_t> token{0}, row{0};
  std::vector<const GridMap<A>*> map;
  std::map<std::pair<int64_t, int64_t>, GridMap<A>> maps;

  Plan(const Ints& sizes, const std::string& mode, int64_t H, int64_t W, bool backward) {
    for (size_t t = 0; t + 1 < sizes.size(); t += 2) {
      const int64_t h = sizes[t], w = sizes[t + 1];
      auto found = maps.find({h, w});
      if (found == maps.end())
        found = maps.emplace(std::pair(h, w),
                             backward ? GridMap<A>::backward(mode, H, W, h, w) : GridMap<A>::forward(mode, H, W, h, w))
                    .first;
      map.push_back(&found->second);
      token.push_back(token.back() + h * w);
      row.push_back(row.back() + h);
    }
  }
};

int64_t total_tokens(const Ints& sizes) {
  int64_t n = 0;
  for (size_t t = 0; t + 1 < sizes.size(); t += 2) n += sizes[t] * sizes[t + 1];
  return n;
}

Tensor grid_pool_ragged(const Tensor& tokens, Ints sizes, std::string mode) {
  contract::grid_pool_ragged(tokens, sizes, mode);
  const Tensor in = dense(tokens);
  const int64_t T_ = in.size(0), H = in.size(1), W = in.size(2), D = in.size(3);
  Tensor out = make(in, {total_tokens(sizes), D});
  dispatch_floating(in.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    using A = acc_t<T>;
    const Plan<A> plan(sizes, mode, H, W, false);
    const T* from = data<T>(in);
    T* to = mutable_data<T>(out);
    const bool streamed = worth_streaming(to, D, out.numel() * sizeof(T));
    parallel_bytes(T_, in.numel() * sizeof(T), [&](int64_t begin, int64_t end) {
      RowScratch<T> scratch;
      for (int64_t f = begin; f < end; ++f) {
        const int64_t w = plan.map[f]->columns.size();
        for (int64_t i = 0; i < plan.map[f]->rows.size(); ++i)
          map_row(*plan.map[f], i, from + f * H * W * D, W, D, static_cast<const A*>(nullptr),
                  to + (plan.token[f] + i * w) * D, D, scratch, streamed);
      }
    });
  });
  return out;
}

Tensor grid_pool_ragged_backward(const Tensor& grad, Ints sizes, Ints grid, std::string mode) {
  contract::grid_pool_ragged_backward(grad, sizes, grid, mode);
  const Tensor g = dense(grad);
  const int64_t T_ = static_cast<int64_t>(sizes.size() / 2), H = grid[0], W = grid[1], D = g.size(1);
  Tensor out = make(g, {T_, H, W, D});
  dispatch_floating(g.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    using A = acc_t<T>;
    const Plan<A> plan(sizes, mode, H, W, true);
    const T* from = data<T>(g);
    T* to = mutable_data<T>(out);
    const bool streamed = worth_streaming(to, D, out.numel() * sizeof(T));
    parallel_bytes(T_ * H, out.numel() * sizeof(T), [&](int64_t begin, int64_t end) {
      RowScratch<T> scratch;
      for (int64_t row = begin; row < end; ++row) {
        const int64_t f = row / H;
        map_row(*plan.map[f], row % H, from + plan.token[f] * D, sizes[2 * f + 1], D, static_cast<const A*>(nullptr),
                to + row * W * D, D, scratch, streamed);
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace vmemory

STABLE_TORCH_LIBRARY_IMPL(vmemory, CPU, m) {
  m.impl("grid_pool_ragged", TORCH_BOX(&vmemory::grid_pool_ragged));
  m.impl("grid_pool_ragged_backward", TORCH_BOX(&vmemory::grid_pool_ragged_backward));
}
