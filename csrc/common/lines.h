// Scratch memory in whole cache lines.
#pragma once

#include <cstdint>
#include <new>

namespace vmemory {

// whole cache lines: a vector that straddles two costs two loads
template <class A>
class Lines {
 public:
  explicit Lines(int64_t n) : at_(static_cast<A*>(::operator new(n * sizeof(A) + 1, std::align_val_t(64)))) {}
  Lines(const Lines&) = delete;
  Lines& operator=(const Lines&) = delete;
  ~Lines() { ::operator delete(at_, std::align_val_t(64)); }
  A* get() const { return at_; }

 private:
  A* at_;
};

}  // namespace vmemory
