// The activation between the two products of routed experts: argument structures and CPU launchers. On CUDA it runs on Triton.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/fp8_tensor.h"
#include "common/macros.h"

namespace grpo_kernels {

// Pre-activations [rows, 2 * width], dense. A row belongs to the slot inv_map[row] = token * K + k; -1: padding.
struct GluRows {
  int64_t rows, width;
  int dtype;
  const int32_t* inv_map;
  int64_t slots;        // the fault of a launcher is a row whose slot is not below it
  const void* weights;  // [slots] double for float64 pre-activations, else float
  int clamped;          // gpt-oss' activation, else silu(gate) * up
  double alpha, limit;  // of that
  int interleaved;      // gates in even and ups in odd columns, else halves
  const void* preact;
};

struct MoeGluArgs {
  GluRows layout;   // weights may be null: 1, and any slot is good
  void* activated;  // [rows, width]
};

struct MoeGluBackwardArgs {
  GluRows layout;
  const void* grad_activated;  // [rows, width], without the rows' weights
  const void* row_terms;       // [rows] of the weights' type, or null: what is added to the gradient of the row's weight
  void* grad_preact;           // [rows, 2 * width]; null: not wanted
  void* activated;             // [rows, width], times the rows' weights; null: not wanted
  void* grad_weights;          // [slots]; null: not wanted. Slots without a row are not written
};

struct MoeGluQuantizeArgs {
  GluRows layout;       // of float32 or less; without weights
  float eps;            // no scale below that of a tile whose largest magnitude is this
  Fp8Tensor activated;  // [rows, width] in tiles of 1 x 128
  Fp8Tensor kept;       // the pre-activations likewise; may be absent
};

// What moe_glu_backward gives of pre-activations in eight bits. What is not wanted is null.
struct MoeGluBackwardQuantizeArgs {
  GluRows layout;              // its `preact` is null, its `dtype` that of the wide results
  Fp8Tensor preact;            // [rows, 2 * width] in tiles of 1 x 128
  const void* grad_activated;  // [rows, width] of `grad_dtype`, without the rows' weights; null: 0
  int grad_dtype;
  const float* row_terms;  // [rows], or null
  float eps, grad_eps;     // for the activation, for the gradient
  Fp8Tensor grad, grad_t;  // of the pre-activations, [rows, 2 * width] and its transpose in tiles of 1 x 128
  void* grad_wide;         // [rows, 2 * width]
  Fp8Tensor activated_t;   // [width, rows], times the rows' weights
  void* activated_wide;    // [rows, width]
  float* grad_weights;     // [slots]; slots without a row are not written
  void* workspace;         // bytes as moe_glu_quantize_workspace says
};

GK_DECLARE_CPU_LAUNCHER(moe_glu, MoeGluArgs)
GK_DECLARE_CPU_LAUNCHER(moe_glu_backward, MoeGluBackwardArgs)
GK_DECLARE_CPU_LAUNCHER(moe_glu_quantize, MoeGluQuantizeArgs)
GK_DECLARE_CPU_LAUNCHER(moe_glu_backward_quantize, MoeGluBackwardQuantizeArgs)

}  // namespace grpo_kernels
