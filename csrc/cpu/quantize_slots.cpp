#include "common/quant.h"
#include "contracts/stored.h"
#include "torch/stable.h"

namespace vmemory {
namespace {

constexpr int64_t kGrainBytes = 1 << 17;  // below this a second thread costs more than it saves

std::tuple<Tensor, Tensor> quantize_slots(const Tensor& x_, int64_t bits) {
  contract::quantize_slots(x_, bits);
  const Tensor x = dense(x_);
  const int64_t D = x.size(x.dim() - 1), stored = stored_bytes(D, bits);
  Ints sizes;
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) sizes.push_back(x.size(d)), rows *= x.size(d);
  Tensor scale = make(x, sizes, ScalarType::Float);
  sizes.push_back(stored);
  Tensor values = make(x, sizes, bits == 8 ? ScalarType::Char : ScalarType::Byte);
  char* to = mutable_data<char>(values);
  dispatch_floating(x.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    parallel(rows, kGrainBytes / (D * sizeof(T) + 1), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        mutable_data<float>(scale)[r] = quantize_row(data<T>(x) + r * D, D, bits, to + r * stored);
    });
  });
  return {values, scale};
}

// with rows [S, N]: those of [S, M], zeros for one that does not exist
Tensor dequantize_slots(const Tensor& values_, const Tensor& scale_, const std::optional<Tensor>& rows_, int64_t D,
                        ScalarType type) {
  contract::dequantize_slots(values_, scale_, rows_, D);
  const Tensor values = dense(values_), scale = dense(scale_), rows = rows_ ? dense(*rows_) : scale;
  const int64_t* wanted = rows_ ? data<int64_t>(rows) : nullptr;
  const int64_t M = wanted ? scale.size(1) : 0, N = wanted ? rows.size(1) : 0;
  Ints sizes;
  for (int64_t d = 0; d < rows.dim(); ++d) sizes.push_back(rows.size(d));
  sizes.push_back(D);
  Tensor out = make(scale, sizes, type);
  dispatch_floating(type, [&](auto t) {
    using T = typename decltype(t)::type;
    const auto run = [&](auto q) {
      using Q = typename decltype(q)::type;
      parallel(rows.numel(), kGrainBytes / (D * sizeof(T) + 1), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          T* to = mutable_data<T>(out) + i * D;
          if (wanted && (wanted[i] < 0 || wanted[i] >= M)) {
            std::fill_n(to, D, T(0));
            continue;
          }
          const int64_t r = wanted ? i / N * M + wanted[i] : i;
          dequantize_row(data<Q>(values) + r * stored_elements<Q>(D), D, data<float>(scale)[r], to);
        }
      });
    };
    values.scalar_type() == ScalarType::Char ? run(tag<int8_t>{}) : run(tag<nibbles>{});
  });
  return out;
}

}  // namespace
}  // namespace vmemory

STABLE_TORCH_LIBRARY_IMPL(vmemory, CPU, m) {
  m.impl("quantize_slots", TORCH_BOX(&vmemory::quantize_slots));
  m.impl("dequantize_slots", TORCH_BOX(&vmemory::dequantize_slots));
}
