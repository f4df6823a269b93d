#include "contracts/grid_pool.h"

#include <cstring>

#include "common/descriptor.h"
#include "common/grid.h"
#include "common/slices.h"
#include "torch/stable.h"

namespace vmemory {
namespace {

// cell (y, x) of the frame lies in quarter 2 (y % 2) + x % 2 of the output cell; version 1 also transposes the grid
struct Shuffle {
  int64_t H, W;
  bool transposed;

  int64_t row(int64_t y, int64_t x) const {
    const int64_t cell = transposed ? (x / 2) * (H / 2) + y / 2 : (y / 2) * (W / 2) + x / 2;
    return cell * 4 + 2 * (y % 2) + x % 2;
  }
};

bool is_shuffle(const std::string& mode) { return mode.rfind("pixel_shuffle", 0) == 0; }
Shuffle shuffle_of(const std::string& mode, int64_t H, int64_t W) { return {H, W, mode == "pixel_shuffle_v1"}; }

template <class T>
void shuffle_row(const Shuffle& shuffle, int64_t y, const T* frame, T* out, int64_t pitch, int64_t D, bool streamed) {
  for (int64_t x = 0; x < shuffle.W; ++x) {
    T* to = out + shuffle.row(y, x) * pitch;
    const T* from = frame + (y * shuffle.W + x) * pitch;
    if (streamed) {
      for_channels<acc_t<T>>(D,
                             [&](int64_t d, int64_t lanes) { put(to + d, load_some(from + d, lanes), lanes, true); });
    } else {
      std::memcpy(to, from, D * sizeof(T));
    }
  }
  if (streamed) finish_streams();
}

template <class T>
void unshuffle_row(const Shuffle& shuffle, int64_t y, const T* grad, const acc_t<T>* bias, T* out, int64_t pitch,
                   int64_t D, bool streamed) {
  using A = acc_t<T>;
  for (int64_t x = 0; x < shuffle.W; ++x, out += pitch) {
    const T* from = grad + shuffle.row(y, x) * pitch;
    for_channels<A>(D, [&](int64_t d, int64_t lanes) {
      const vec<A> g = load_some(from + d, lanes);
      put(out + d, bias ? g + load_some(bias + d, lanes) : g, lanes, streamed);
    });
  }
  if (streamed) finish_streams();
}

struct Shape {
  int64_t B, H, W, D, h, w;
  int64_t cells() const { return H * W; }
};

// f(pool_row) with pool_row(frame, i, slice begin, slice width, out) for target row i
template <class T, class F>
void with_row_kernel(const std::string& mode, const Shape& s, bool streamed, const F& f) {
  if (is_shuffle(mode)) {
    const Shuffle shuffle = shuffle_of(mode, s.H, s.W);
    f(s.H, [&](const T* frame, int64_t y, int64_t d, int64_t width, T* out, RowScratch<T>&) {
      shuffle_row(shuffle, y, frame + d, out + d, s.D, width, streamed);
      return y + 1;
    });
    return;
  }
  const auto map = GridMap<acc_t<T>>::forward(mode, s.H, s.W, s.h, s.w);
  f(s.h, [&](const T* frame, int64_t i, int64_t d, int64_t width, T* out, RowScratch<T>& scratch) {
    map_row(map, i, frame + d, s.W, s.D, static_cast<const acc_t<T>*>(nullptr), out + i * s.w * s.D + d, width, scratch,
            streamed);
    return map.rows.source[map.rows.start[i + 1] - 1] + 1;
  });
}

Shape shape_of(const Tensor& in, const Ints& size) {
  return {in.size(0), in.size(1), in.size(2), in.size(3), size[0], size[1]};
}

Tensor make_pooled(const Tensor& in, const Shape& s, const std::string& mode) {
  return make(in, {s.B, s.h, s.w, is_shuffle(mode) ? 4 * s.D : s.D});
}

Tensor grid_pool(const Tensor& tokens, Ints size, std::string mode) {
  contract::grid_pool(tokens, size, mode);
  const Tensor in = dense(tokens);
  const Shape s = shape_of(in, size);
  Tensor out = make_pooled(in, s, mode);
  dispatch_floating(in.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    const T* from = data<T>(in);
    T* to = mutable_data<T>(out);
    const int64_t frame_out = out.numel() / std::max<int64_t>(s.B, 1);
    const bool streamed = worth_streaming(to, s.D, out.numel() * sizeof(T));
    with_row_kernel<T>(mode, s, streamed, [&](int64_t rows, const auto& pool_row) {
      const int64_t bytes = in.numel() * sizeof(T);
      const Slices slices(s.D, s.B * rows, threads_for(bytes));
      parallel_bytes(s.B * rows * slices.count, bytes, [&](int64_t begin, int64_t end) {
        RowScratch<T> scratch;
        for (int64_t item = begin; item < end; ++item) {
          const int64_t slice = item % slices.count, i = item / slices.count % rows, b = item / slices.count / rows;
          pool_row(from + b * s.cells() * s.D, i, slices.begin(slice), slices.size(slice), to + b * frame_out, scratch);
        }
      });
    });
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> grid_pool_stats(const Tensor& tokens, Ints size, std::string mode) {
  contract::grid_pool(tokens, size, mode);
  const Tensor in = dense(tokens);
  const Shape s = shape_of(in, size);
  Tensor out = make_pooled(in, s, mode);
  const ScalarType wide = in.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor mean = make(in, {s.B, s.D}, wide), norms = make(in, {s.B}, wide);
  dispatch_floating(in.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    using A = acc_t<T>;
    const T* from = data<T>(in);
    T* to = mutable_data<T>(out);
    A* means = mutable_data<A>(mean);
    const int64_t frame_out = out.numel() / std::max<int64_t>(s.B, 1);
    const bool streamed = worth_streaming(to, s.D, out.numel() * sizeof(T));
    with_row_kernel<T>(mode, s, streamed, [&](int64_t rows, const auto& pool_row) {
      const int64_t bytes = in.numel() * sizeof(T);
      const Slices slices(s.D, s.B, threads_for(bytes));
      parallel_bytes(s.B * slices.count, bytes, [&](int64_t begin, int64_t end) {
        RowScratch<T> scratch;
        for (int64_t item = begin; item < end; ++item) {
          const int64_t b = item / slices.count, d = slices.begin(item % slices.count);
          const int64_t width = slices.size(item % slices.count);
          const T* frame = from + b * s.cells() * s.D;
          CellSum<T> sum(width);
          sum.reset();
          // the rows just pooled are still in the second-level cache
          for (int64_t i = 0; i < rows; ++i) {
            const int64_t read = pool_row(frame, i, d, width, to + b * frame_out, scratch);
            sum.add(frame + d, s.D, read * s.W);
          }
          sum.mean(frame + d, s.D, s.cells(), means + b * s.D + d);
        }
      });
    });
    A* norm_out = mutable_data<A>(norms);
    parallel_bytes(s.B, s.B * s.D * sizeof(A), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) norm_out[b] = norm(means + b * s.D, s.D);
    });
  });
  return {out, mean, norms};
}

Tensor grid_pool_backward(const Tensor& grad, std::optional<Tensor> cell, Ints grid, std::string mode) {
  contract::grid_pool_backward(grad, cell, grid, mode);
  const Tensor g = dense(grad);
  const int64_t channels = is_shuffle(mode) ? g.size(3) / 4 : g.size(3);
  const Shape s{g.size(0), grid[0], grid[1], channels, g.size(1), g.size(2)};
  Tensor out = make(g, {s.B, s.H, s.W, s.D});
  const Tensor bias = cell ? dense(*cell) : g;
  dispatch_floating(g.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    using A = acc_t<T>;
    const T* from = data<T>(g);
    T* to = mutable_data<T>(out);
    const A* biases = cell ? data<A>(bias) : nullptr;
    const int64_t frame_in = g.numel() / std::max<int64_t>(s.B, 1);
    const bool streamed = worth_streaming(to, s.D, out.numel() * sizeof(T));
    const Shuffle shuffle = shuffle_of(mode, s.H, s.W);
    const auto map = is_shuffle(mode) ? GridMap<A>() : GridMap<A>::backward(mode, s.H, s.W, s.h, s.w);
    parallel_bytes(s.B * s.H, out.numel() * sizeof(T), [&](int64_t begin, int64_t end) {
      RowScratch<T> scratch;
      for (int64_t row = begin; row < end; ++row) {
        const int64_t b = row / s.H, y = row % s.H;
        const T* frame = from + b * frame_in;
        const A* bias_row = biases ? biases + b * s.D : nullptr;
        T* out_row = to + row * s.W * s.D;
        if (is_shuffle(mode)) {
          unshuffle_row(shuffle, y, frame, bias_row, out_row, s.D, s.D, streamed);
        } else {
          map_row(map, y, frame, s.w, s.D, bias_row, out_row, s.D, scratch, streamed);
        }
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace vmemory

STABLE_TORCH_LIBRARY_IMPL(vmemory, CPU, m) {
  m.impl("grid_pool", TORCH_BOX(&vmemory::grid_pool));
  m.impl("grid_pool_stats", TORCH_BOX(&vmemory::grid_pool_stats));
  m.impl("grid_pool_backward", TORCH_BOX(&vmemory::grid_pool_backward));
}
