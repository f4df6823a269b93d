// What device code may touch: the tensors of the running operator and the arguments of the running launch.
#pragma once

#include <cstddef>

namespace simt {

// an operator begins or ends: what was known is forgotten
void forget_memory();
// memory whose values are known, and memory that was allocated and holds nothing yet; elements of so many bytes
void know_memory(const void* p, size_t bytes, size_t element, const char* what);
void make_memory(void* p, size_t bytes, size_t element);
// the host, or a library, wrote there
void write_memory(const void* p, size_t bytes);

}  // namespace simt
