// The emulator's hooks for tensors. torch/stable.h includes this file in place of its own.
#pragma once

#include "simt/memory.h"

namespace vmemory {

inline size_t bytes_of(const torch::stable::Tensor& t) {
  if (t.numel() == 0) return 0;
  int64_t last = 0;
  for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  return (last + 1) * t.element_size();
}

inline void known(const torch::stable::Tensor& t) {
  simt::know_memory(t.const_data_ptr(), bytes_of(t), t.element_size(), "a tensor");
}
inline void made(const torch::stable::Tensor& t) {
  if (t.numel() > 0) simt::make_memory(t.mutable_data_ptr(), bytes_of(t), t.element_size());
}
inline void written(const torch::stable::Tensor& t) { simt::write_memory(t.const_data_ptr(), bytes_of(t)); }

}  // namespace vmemory
