// The activation between the two products of routed experts: argument structures and CPU launchers. On CUDA it runs on Triton.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/macros.h"

namespace grpo_kernels {

// Pre-activations [rows, 2 * width], dense. A row belongs to the slot inv_map[row] = token * K + k; -1: padding.
struct GluRows {
  int64_t rows, width;
  int dtype;
  const int32_t* inv_map;
  int64_t slots;        // the fault of a launcher is a row whose slot is not below it; it is left alone
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

GK_DECLARE_CPU_LAUNCHER(moe_glu, MoeGluArgs)
GK_DECLARE_CPU_LAUNCHER(moe_glu_backward, MoeGluBackwardArgs)

}  // namespace grpo_kernels
