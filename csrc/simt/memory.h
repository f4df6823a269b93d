// The memory that device code may access: tensors of the running operator and arguments of the running launch.
#pragma once

#include <cstddef>

namespace simt {

// clears all knowledge at the beginning and end of an operator
void forget_memory();
// registers memory with known values, or allocated memory without values; `element` is the size of an element
void know_memory(const void* p, size_t bytes, size_t element, const char* what);
void make_memory(void* p, size_t bytes, size_t element);
// registers a write by the host or a library
void write_memory(const void* p, size_t bytes);

}  // namespace simt
