// The device language: CUDA's, or its emulation in C++ where there is no device. Torch-free.
#pragma once

#ifdef VMEMORY_SIMT
#include "simt/language.h"
#else
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

// an array, or a variable, that the threads of a block share: VMEMORY_SHARED(sums, float[4][32]);
#define VMEMORY_SHARED(name, ...) __shared__ std::type_identity_t<__VA_ARGS__> name

// the block's shared memory of which the launch tells the size, 16 bytes aligned
template <class T>
__device__ T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char vmemory_dynamic_shared[];
  return reinterpret_cast<T*>(vmemory_dynamic_shared);
}
#endif
