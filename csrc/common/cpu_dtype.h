// From an element type's number to the type, for CPU kernels.
#pragma once

#include "common/dtype.h"

namespace grpo_kernels {
namespace GK_ISA {

// What elements of a type are computed in.
template <typename T>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};

// Calls body(T()), where T is the element type that `dtype` numbers: one of those that are computed in float.
template <typename Body>
GK_HOST_DEVICE auto by_float_dtype(int dtype, const Body& body) {
  switch (dtype) {
    case kBFloat16:
      return body(bfloat16());
    case kFloat16:
      return body(float16());
    default:
      return body(float());
  }
}

// The same of any type.
template <typename Body>
GK_HOST_DEVICE auto by_dtype(int dtype, const Body& body) {
  return dtype == kFloat64 ? body(double()) : by_float_dtype(dtype, body);
}

}  // namespace GK_ISA
}  // namespace grpo_kernels
