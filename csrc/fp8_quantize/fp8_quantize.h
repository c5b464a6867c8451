// Tensors as e4m3 with a scale for every tile, and back.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/fp8_tensor.h"
#include "common/macros.h"

namespace grpo_kernels {

// x in tiles of 1 x 128, square: of 128 x 128, and its transpose in such tiles of its own.
struct Fp8QuantizeArgs {
  const void* x;  // [batch, rows, columns], dense last axis
  int64_t batch_stride, row_stride;
  int dtype;
  int64_t batch, rows, columns;
  int square, power_of_two;
  float eps;
  Fp8Tensor plain;
  Fp8Tensor transposed;  // [batch, columns, rows]
};

// out = data * scale, in `dtype`, contiguous.
struct Fp8DequantizeArgs {
  Fp8Tensor in;
  int64_t batch, rows, columns;
  int row_tile, column_tile;  // elements of each axis that share a scale: 1 or 128
  int dtype;
  void* out;
};

GK_DECLARE_CPU_LAUNCHER(fp8_quantize, Fp8QuantizeArgs)
GK_DECLARE_CPU_LAUNCHER(fp8_dequantize, Fp8DequantizeArgs)

}  // namespace grpo_kernels
