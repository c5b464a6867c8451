// What a thread of moe_glu_backward_quantize remembers: rows in float32, and the largest magnitudes of their columns.
#pragma once

#include <cstdint>

#include "common/e4m3.h"

namespace grpo_kernels {
namespace GK_ISA {

// In elements of four bytes. A row holds the gradient of the pre-activations, then the activation.
struct GluWorkspace {
  int64_t activated;  // where the activation begins
  int64_t stride;     // from a row to the next: an odd number of cache lines, which spreads a column over the cache
  int64_t rows;       // transposed tiles want 128 at once
  int64_t size;       // the rows, and a row of maxima

  static GK_HOST_DEVICE GluWorkspace of(int64_t width, bool transposed) {
    const int64_t line = 16;
    const int64_t activated = (2 * width + line - 1) / line * line;
    const int64_t lines = activated / line + (width + line - 1) / line;
    const int64_t stride = (lines | 1) * line, rows = transposed ? kTile : 1;
    return {activated, stride, rows, (rows + 1) * stride};
  }
};

}  // namespace GK_ISA
}  // namespace grpo_kernels
