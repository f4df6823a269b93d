// Argument checks of rows that may be stored in int8 or, two values per byte, in uint8.
#pragma once

#include "torch/expect.h"

namespace vmemory::contract {

inline bool quantized(const Argument& rows) { return rows.type() == dtype::int8 || rows.type() == dtype::uint8; }

inline int64_t stored_channels(const Argument& rows, int64_t channels) {
  return rows.type() == dtype::uint8 ? (channels + 1) / 2 : channels;
}

// quantised, or of the same type as `other`
inline void stored_beside(const Argument& rows, const Argument& other) {
  quantized(rows) ? rows.beside(other) : rows.like(other);
}

// a scale for quantised rows and only then; the caller checks its shape
inline const Argument& scale_of(const Argument& rows, const Argument& scale) {
  VMEMORY_CHECK(scale.given() == quantized(rows),
                "scale: expected one with int8 or uint8 rows and only then, they are ", dtype::name(rows.type()));
  return scale.of(dtype::float32).beside(rows);
}

// a byte that holds two values is none of int8
inline void quantize_slots(const Tensor& x, int64_t bits) {
  Argument("x", x).at_least_dims(1).floating();
  VMEMORY_CHECK(bits == 8 || bits == 4, "bits: expected 8 or 4, got ", bits);
}

inline void dequantize_slots(const Tensor& values_, const Tensor& scale_, const std::optional<Tensor>& rows_,
                             int64_t channels) {
  const Argument values("values", values_), scale("scale", scale_), rows("rows", rows_);
  values.at_least_dims(1);
  VMEMORY_CHECK(quantized(values), "values: expected int8 or uint8, got ", dtype::name(values.type()));
  const int64_t last = values.dims() - 1;
  bool fits = scale.dims() == last;
  for (int64_t d = 0; fits && d < last; ++d) fits = scale.size(d) == values.size(d);
  VMEMORY_CHECK(fits, "scale: expected the shape of values less its last dimension");
  scale.of(dtype::float32).beside(values);
  if (rows.given()) {
    values.shape({kAny, kAny, kAny});
    rows.shape({values.size(0), kAny}).of(dtype::int64).beside(values);
  }
  expect_int("dim", channels, 0, kMostElements);
  VMEMORY_CHECK(stored_channels(values, channels) == values.size(last), "dim: expected one that fits ",
                values.size(last), " stored values a row, got ", channels);
}

}  // namespace vmemory::contract
