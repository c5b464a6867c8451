// From Python's numbers to tensors in eight bits.
#pragma once

#include <pybind11/stl.h>

#include <array>

#include "bindings/bindings.h"
#include "common/fp8_tensor.h"

namespace grpo_kernels {

using Fp8Numbers = std::array<int64_t, 7>;  // the fields of Fp8Tensor

inline Fp8Tensor fp8_tensor(const Fp8Numbers& numbers) {
  return {pointer<uint8_t>(Address(numbers[0])),
          numbers[1],
          numbers[2],
          pointer<float>(Address(numbers[3])),
          numbers[4],
          numbers[5],
          numbers[6]};
}

}  // namespace grpo_kernels
