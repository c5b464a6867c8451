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

// Calls body(T()), where T is the element type that `dtype` numbers.
template <typename Body>
GK_HOST_DEVICE auto by_dtype(int dtype, const Body& body) {
  switch (dtype) {
    case kFloat64:
      return body(double());
    case kBFloat16:
      return body(bfloat16());
    case kFloat16:
      return body(float16());
    default:
      return body(float());
  }
}

}  // namespace GK_ISA
}  // namespace grpo_kernels
