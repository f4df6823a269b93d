// The only file that names torch headers: checks, dtype dispatch, threads, current stream, device guard.
#pragma once

#include <dlfcn.h>
#include <sys/mman.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "common/vec.h"
#ifdef VMEMORY_SIMT
#include "simt/tensors.h"
#endif

namespace vmemory {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
// the stable boxing wants ints in a std::vector and optionals by value
using Ints = std::vector<int64_t>;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

#define VMEMORY_CHECK(condition, ...) ((condition) ? void() : ::vmemory::fail("vmemory: ", __VA_ARGS__))

#ifndef VMEMORY_SIMT
// used by the device emulator only (simt/tensors.h)
inline void known(const Tensor&) {}
inline void made(const Tensor&) {}
inline void written(const Tensor&) {}
#endif

template <class T>
struct tag {
  using type = T;
};

// f(tag<T>) with the storage type of a floating tensor: double, float, f16 or bf16
template <class F>
auto dispatch_floating(ScalarType type, F&& f) {
  switch (type) {
    case ScalarType::Double:
      return f(tag<double>{});
    case ScalarType::Float:
      return f(tag<float>{});
    case ScalarType::Half:
      return f(tag<f16>{});
    case ScalarType::BFloat16:
      return f(tag<bf16>{});
    default:
      VMEMORY_CHECK(false, "expected a float64, float32, float16 or bfloat16 tensor");
      return f(tag<float>{});
  }
}

// f(tag<Q>) with the element type of rows stored beside T: int8_t, nibbles or T itself
template <class T, class F>
auto dispatch_stored(ScalarType type, F&& f) {
  switch (type) {
    case ScalarType::Char:
      return f(tag<int8_t>{});
    case ScalarType::Byte:
      return f(tag<nibbles>{});
    default:
      return f(tag<T>{});
  }
}

// what an empty tensor points to: nothing is read or written there, but a null pointer must not be handed to memcpy
// even for no bytes, nor be moved along
inline void* nowhere() {
  alignas(64) static char none[64];
  return none;
}

template <class T>
const T* data(const Tensor& t) {
  known(t);
  const void* first = t.const_data_ptr();
  return static_cast<const T*>(first ? first : nowhere());
}

template <class T>
T* mutable_data(const Tensor& t) {
  known(t);
  void* first = t.mutable_data_ptr();
  return static_cast<T*>(first ? first : nowhere());
}

// A large buffer is newly mapped each time, and touching it in 4 KB pages can cost more than computing its content.
// This is advice only: without huge pages it has no effect.
inline void advise_huge_pages(void* begin, size_t bytes) {
  constexpr uintptr_t kPage = uintptr_t(2) << 20;
  if (bytes < 2 * kPage) return;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + kPage - 1) / kPage * kPage;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(begin) + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}

// an uninitialised tensor on the device of `like`
inline Tensor make(const Tensor& like, const Ints& sizes, std::optional<ScalarType> type = std::nullopt) {
  Tensor out = torch::stable::new_empty(like, sizes, type);
  if (out.is_cpu()) advise_huge_pages(out.mutable_data_ptr(), out.numel() * out.element_size());
  made(out);
  return out;
}

inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// f(begin, end) over [0, n) on torch's own threads, at least `grain` each
template <class F>
void parallel(int64_t n, int64_t grain, const F& f) {
  torch::stable::parallel_for(0, n, grain < 1 ? 1 : grain, f);
}

// Number of threads for this much memory traffic: waking a thread takes about as long as reading a megabyte.
inline int64_t threads_for(int64_t bytes) {
  return std::min<int64_t>(torch::stable::get_num_threads(), std::max<int64_t>(1, bytes >> 20));
}

// f(begin, end) over [0, n) items that move `bytes` together
template <class F>
void parallel_bytes(int64_t n, int64_t bytes, const F& f) {
  const int64_t threads = threads_for(bytes);
  threads == 1 ? f(0, n) : parallel(n, (n + threads - 1) / threads, f);
}

#ifdef __CUDACC__
// torch's current stream of the device. Looked up at run time because the symbol exists in CUDA builds of torch only
// and this library must also load next to a CPU build; RTLD_DEFAULT does not find it, a handle on the library does.
// The device is set in this library's own CUDA runtime too, which knows nothing of what torch set in its own.
inline cudaStream_t current_stream(const Tensor& t) {
  using Getter = AOTITorchError (*)(int32_t, void**);
  static const Getter getter = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return library ? reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  VMEMORY_CHECK(getter != nullptr, "this torch has no CUDA: libtorch_cuda.so is not loaded");
  const cudaError_t error = cudaSetDevice(t.get_device_index());
  VMEMORY_CHECK(error == cudaSuccess, "cudaSetDevice: ", cudaGetErrorString(error));
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(getter(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(const char* what) {
  const cudaError_t error = cudaGetLastError();
  VMEMORY_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}
#endif

}  // namespace vmemory
