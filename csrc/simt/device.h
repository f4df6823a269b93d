// The emulated device, with the interface of cuda/device.h.
#pragma once

#include <array>
#include <tuple>

#include "simt/launch.h"
#include "torch/stable.h"

// beside the CPU kernels, which keep the namespace `vmemory`
#define VMEMORY_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(vmemory_simt, CPU, m)

namespace vmemory {

class Device {
 public:
  explicit Device(const Tensor&) { simt::forget_memory(); }
  ~Device() { simt::forget_memory(); }
  Device(const Device&) = delete;

  template <class... P, class... Given>
  void launch(const char* what, void (*kernel)(P...), dim3 grid, int threads, size_t shared, Given&&... given) const {
    start<P...>(what, kernel, grid, threads, shared, false, {static_cast<P>(given)...});
  }
  template <class... P, class... Given>
  void launch_together(const char* what, void (*kernel)(P...), dim3 grid, int threads, size_t shared,
                       Given&&... given) const {
    start<P...>(what, kernel, grid, threads, shared, true, {static_cast<P>(given)...});
  }
  template <class... P>
  int64_t resident_blocks(void (*)(P...), int, size_t) const {
    return 2 * simt::processors();
  }
  int64_t processors() const { return simt::processors(); }
  void clear(const Tensor& t) const {
    memset(t.mutable_data_ptr(), 0, bytes_of(t));
    written(t);
  }

 private:
  template <class... P>
  void start(const char* what, void (*kernel)(P...), dim3 grid, int threads, size_t shared, bool together,
             const std::tuple<P...>& args) const {
    struct Bound {
      void (*kernel)(P...);
      std::tuple<P...> args;
    };
    const Bound bound{kernel, args};
    const auto body = [](const void* p) {
      const Bound& own = *static_cast<const Bound*>(p);
      std::apply(own.kernel, own.args);
    };
    const char* refused =
        simt::run({what, grid, static_cast<unsigned>(threads), shared, together, body, &bound, sizeof bound});
    VMEMORY_CHECK(refused == nullptr, what, ": ", refused);
  }
};

}  // namespace vmemory
