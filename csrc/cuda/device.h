// The device that an operator runs on, as hosts see it: current while it runs, and all launches go through it.
#pragma once

#ifdef VMEMORY_SIMT
#include "simt/device.h"
#else

#include <mutex>
#include <tuple>
#include <utility>
#include <vector>

#include "torch/stable.h"

#define VMEMORY_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(vmemory, CUDA, m)

namespace vmemory {

class Device {
 public:
  explicit Device(const Tensor& on)
      : index_(on.get_device_index()), guard_(on.get_device_index()), stream_(current_stream(on)) {}
  Device(const Device&) = delete;

  // launches a kernel on torch's current stream; an error message begins with `what`
  template <class... P, class... Given>
  void launch(const char* what, void (*kernel)(P...), dim3 grid, int threads, size_t shared, Given&&... given) const {
    start<P...>(what, kernel, grid, threads, shared, false, {static_cast<P>(given)...});
  }

  // the same with all blocks at once, so that they may wait for each other; see resident_blocks
  template <class... P, class... Given>
  void launch_together(const char* what, void (*kernel)(P...), dim3 grid, int threads, size_t shared,
                       Given&&... given) const {
    start<P...>(what, kernel, grid, threads, shared, true, {static_cast<P>(given)...});
  }

  // blocks of a kernel that the device holds at once
  template <class... P>
  int64_t resident_blocks(void (*kernel)(P...), int threads, size_t shared) const {
    struct Known {
      const void* kernel;
      int32_t device;
      size_t shared;
      int64_t blocks;
    };
    static std::mutex mutex;
    static std::vector<Known> known;
    const void* address = reinterpret_cast<const void*>(kernel);
    const std::lock_guard<std::mutex> lock(mutex);
    for (const Known& k : known)
      if (k.kernel == address && k.device == index_ && k.shared == shared) return k.blocks;
    int each = 0;
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, address, threads, shared);
    known.push_back({address, index_, shared, each * processors()});
    return known.back().blocks;
  }

  int64_t processors() const {
    int count = 0;
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index_);
    return count;
  }

  // zeros everywhere
  void clear(const Tensor& t) const { cudaMemsetAsync(t.mutable_data_ptr(), 0, t.numel() * t.element_size(), stream_); }

 private:
  template <class... P>
  void start(const char* what, void (*kernel)(P...), dim3 grid, int threads, size_t shared, bool together,
             std::tuple<P...> args) const {
    std::apply(
        [&](P&... each) {
          void* pointers[] = {&each...};
          const void* address = reinterpret_cast<const void*>(kernel);
          if (together) {
            cudaLaunchCooperativeKernel(address, grid, dim3(threads), pointers, shared, stream_);
          } else {
            cudaLaunchKernel(address, grid, dim3(threads), pointers, shared, stream_);
          }
        },
        args);
    check_launch(what);
  }

  const int32_t index_;
  const torch::stable::accelerator::DeviceGuard guard_;
  const cudaStream_t stream_;
};

}  // namespace vmemory

#endif
