// A tensor in eight bits, as the bindings hand it to a kernel.
#pragma once

#include <cstdint>

namespace grpo_kernels {

// Strides in elements. Rows of data are dense.
struct Fp8Tensor {
  uint8_t* data;  // [batch, rows, columns]; null: not wanted
  int64_t batch_stride, row_stride;
  float* scale;  // [batch, rows or their tiles, tiles of columns]
  int64_t scale_batch_stride, scale_row_stride, scale_tile_stride;
};

}  // namespace grpo_kernels
