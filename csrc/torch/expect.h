// Argument checks of operators, made once per call before anything is allocated or changed. Each
// message names the argument, the expectation and the given value.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <sstream>

#include "torch/stable.h"

namespace vmemory {

constexpr int64_t kAny = -1;                         // a size that may be anything
constexpr int64_t kMostElements = int64_t(1) << 48;  // of a tensor, empty sizes as 1: products of sizes cannot overflow
constexpr int64_t kMostRows = std::numeric_limits<int32_t>::max();  // of what is numbered by 32 bits
constexpr int64_t kMostSide = int64_t(1) << 20;                     // cells along one side of a grid

namespace dtype {
inline const int32_t float64 = aoti_torch_dtype_float64(), float32 = aoti_torch_dtype_float32();
inline const int32_t float16 = aoti_torch_dtype_float16(), bfloat16 = aoti_torch_dtype_bfloat16();
inline const int32_t int64 = aoti_torch_dtype_int64(), int8 = aoti_torch_dtype_int8(), uint8 = aoti_torch_dtype_uint8();
inline const int32_t boolean = aoti_torch_dtype_bool();

inline const char* name(int32_t type) {
  if (type == float64) return "float64";
  if (type == float32) return "float32";
  if (type == float16) return "float16";
  if (type == bfloat16) return "bfloat16";
  if (type == int64) return "int64";
  if (type == int8) return "int8";
  if (type == uint8) return "uint8";
  return type == boolean ? "bool" : "another dtype";
}
}  // namespace dtype

// A tensor argument. An optional argument that was not given passes every check.
class Argument {
 public:
  Argument(const char* name, const Tensor& t) : name_(name), tensor_(&t) {
    int64_t* sizes = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(t.get(), &sizes));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(t.get(), &dims_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &type_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &device_));
    sizes_ = sizes;
    int64_t left = kMostElements;
    for (int64_t d = 0; d < dims_; ++d) left /= std::max<int64_t>(1, sizes_[d]);
    VMEMORY_CHECK(left > 0, name_, ": expected at most 2^48 elements, got shape ", shape_text());
  }
  Argument(const char* name, const std::optional<Tensor>& t) : Argument(t ? Argument(name, *t) : Argument(name)) {}

  bool given() const { return tensor_ != nullptr; }
  bool on_cpu() const { return device_ == aoti_torch_device_type_cpu(); }
  int64_t dims() const { return dims_; }
  int64_t size(int64_t d) const { return sizes_[d]; }
  int32_t type() const { return type_; }

  // exactly these sizes, or kAny
  const Argument& shape(std::initializer_list<int64_t> expected) const {
    if (!given()) return *this;
    bool fits = dims_ == static_cast<int64_t>(expected.size());
    for (int64_t d = 0; fits && d < dims_; ++d) fits = expected.begin()[d] == kAny || expected.begin()[d] == sizes_[d];
    VMEMORY_CHECK(fits, name_, ": expected shape ", text(expected.begin(), expected.size()), ", got ", shape_text());
    return *this;
  }
  const Argument& at_least_dims(int64_t least) const {
    VMEMORY_CHECK(dims_ >= least, name_, ": expected at least ", least, " dimensions, got shape ", shape_text());
    return *this;
  }
  const Argument& at_least(int64_t least, int64_t d) const {
    VMEMORY_CHECK(sizes_[d] >= least, name_, ": expected at least ", least, " in dimension ", d, ", got shape ",
                  shape_text());
    return *this;
  }
  const Argument& at_most(int64_t most, int64_t d) const {
    VMEMORY_CHECK(sizes_[d] <= most, name_, ": expected at most ", most, " in dimension ", d, ", got shape ",
                  shape_text());
    return *this;
  }

  const Argument& floating() const {
    const bool fits =
        type_ == dtype::float32 || type_ == dtype::bfloat16 || type_ == dtype::float16 || type_ == dtype::float64;
    VMEMORY_CHECK(fits, name_, ": expected float64, float32, float16 or bfloat16, got ", dtype::name(type_));
    return *this;
  }
  const Argument& of(int32_t type) const {
    VMEMORY_CHECK(!given() || type_ == type, name_, ": expected ", dtype::name(type), ", got ", dtype::name(type_));
    return *this;
  }
  // the type that sums of the other's elements are kept in
  const Argument& sums_of(const Argument& other) const {
    return of(other.type_ == dtype::float64 ? dtype::float64 : dtype::float32).beside(other);
  }
  const Argument& like(const Argument& other) const { return of(other.type_).beside(other); }

  const Argument& beside(const Argument& other) const {
    if (!given()) return *this;
    bool same = device_ == other.device_;
    if (same && !on_cpu()) same = tensor_->get_device_index() == other.tensor_->get_device_index();
    VMEMORY_CHECK(same, name_, ": expected the device of ", other.name_);
    return *this;
  }

  // it is written where it lies
  const Argument& in_place() const {
    VMEMORY_CHECK(!given() || tensor_->is_contiguous(), name_,
                  ": expected a contiguous tensor, it is changed in place");
    return *this;
  }

  // Values of int64 in [low, high]. On a device this would wait for it: there kernels clamp what they read.
  const Argument& values(int64_t low, int64_t high) const {
    if (!given() || !on_cpu()) return *this;
    const Tensor all = dense(*tensor_);
    const int64_t *value = data<int64_t>(all), n = all.numel();
    bool fits = true;
    for (int64_t i = 0; i < n; ++i) fits &= value[i] >= low && value[i] <= high;
    for (int64_t i = 0; !fits && i < n; ++i)
      VMEMORY_CHECK(value[i] >= low && value[i] <= high, name_, ": expected values from ", low, " to ", high, ", got ",
                    value[i]);
    return *this;
  }

  // rows of offsets that begin with 0, do not decrease and end with `last`
  const Argument& starts(int64_t last) const {
    if (!given() || !on_cpu()) return *this;
    const Tensor all = dense(*tensor_);
    const int64_t n = sizes_[1];
    for (int64_t s = 0; s < sizes_[0]; ++s) {
      const int64_t* row = data<int64_t>(all) + s * n;
      bool fits = row[0] == 0 && row[n - 1] == last;
      for (int64_t i = 1; i < n; ++i) fits &= row[i] > row[i - 1];
      VMEMORY_CHECK(fits, name_, ": expected rows that grow from 0 to ", last, ", row ", s, " does not");
    }
    return *this;
  }

 private:
  explicit Argument(const char* name) : name_(name) {}

  static std::string text(const int64_t* sizes, int64_t n) {
    std::ostringstream out;
    out << "[";
    for (int64_t d = 0; d < n; ++d) sizes[d] == kAny ? out << (d ? ", *" : "*") : out << (d ? ", " : "") << sizes[d];
    out << "]";
    return out.str();
  }
  std::string shape_text() const { return text(sizes_, dims_); }

  const char* name_;
  const Tensor* tensor_ = nullptr;
  const int64_t* sizes_ = nullptr;
  int64_t dims_ = 0;
  int32_t type_ = -1, device_ = 0;
};

inline void expect_int(const char* name, int64_t value, int64_t low, int64_t high) {
  VMEMORY_CHECK(value >= low && value <= high, name, ": expected ", low, " to ", high, ", got ", value);
}

// height and width of a grid
inline void expect_grid(const char* name, const Ints& sides) {
  VMEMORY_CHECK(sides.size() == 2, name, ": expected height and width, got ", sides.size(), " numbers");
  for (const int64_t side : sides) expect_int(name, side, 1, kMostSide);
}

inline void expect_choice(const char* name, const std::string& value, std::initializer_list<const char*> choices) {
  for (const char* choice : choices)
    if (value == choice) return;
  std::ostringstream all;
  for (const char* choice : choices) all << (choice == *choices.begin() ? "" : ", ") << choice;
  VMEMORY_CHECK(false, name, ": expected one of ", all.str(), ", got ", value);
}

}  // namespace vmemory
