// Permutation of tokens to experts: argument structures and launchers. On CUDA the moves run on Triton, the map does not.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/macros.h"

namespace grpo_kernels {

// A slot is token * K + k. The slots are cut into `tiles` parts of neighbours (formula.h: tile_slots); whoever counts the
// experts of a part leaves the counts in the workspace, which say where each part's rows begin.
struct BuildPermutationArgs {
  const void* topk_ids;  // [slots]
  int wide_ids;          // int64, else int32
  int64_t slots;
  int num_experts;  // at most 1024; an id that is not below it has no row, and on the CPU is a fault
  int first, last;  // only these experts get rows; 0 <= first <= last <= num_experts
  int64_t alignment;
  int64_t rows;                // R, a multiple of the alignment; less than 2^31
  int tiles;                   // at least 1
  int32_t* workspace;          // [tiles, last - first], not initialised
  int32_t* row_id_map;         // [slots]; the row of a slot, -1: none
  int32_t* inv_map;            // [rows]; the slot of a row, -1: padding
  int32_t* offsets;            // [last - first]; the row behind each expert's segment
  int32_t* tokens_per_expert;  // [last - first]
};

// Rows of x by token, and of `out` by inv_map: out[r] = x[inv_map[r] / top_k], times the slot's weight; 0 in padding.
struct MoePermuteArgs {
  const void* x;     // [tokens, hidden], dense last axis
  int64_t x_stride;  // elements from row to row
  int dtype;
  int64_t tokens, hidden, rows;
  int top_k;
  const int32_t* row_id_map;
  const int32_t* inv_map;
  const void* topk_weights;  // [tokens, top_k] float, double for double rows; null: 1
  void* out;                 // [rows, hidden]
};

// out[t] = sum over k of weight * y[row_id_map[t, k]], in that order.
struct MoeUnpermuteArgs {
  const void* y;  // [rows, hidden], dense last axis
  int64_t y_stride;
  int dtype;
  int64_t tokens, hidden, rows;
  int top_k;
  const int32_t* row_id_map;
  const void* topk_weights;  // as above
  void* out;                 // [tokens, hidden]
};

// The gradients of that: grad_y[r] = weight * grad[t], 0 in padding; grad_weights[t, k] = <grad[t], y[r]>, 0 without a row.
struct MoeUnpermuteBackwardArgs {
  const void* grad;  // [tokens, hidden], dense last axis
  int64_t grad_stride;
  const void* y;  // [rows, hidden], dense last axis
  int64_t y_stride;
  int dtype;  // of both
  int64_t tokens, hidden, rows;
  int top_k;
  const int32_t* row_id_map;
  const int32_t* inv_map;
  const void* topk_weights;  // [tokens, top_k], not null
  void* grad_y;              // [rows, hidden]
  void* grad_weights;        // [tokens, top_k], like the weights
};

GK_DECLARE_CPU_LAUNCHER(build_permutation, BuildPermutationArgs)  // the fault is the first slot with an id out of range
// The fault of the moves is a slot whose row, or a row whose slot, is not there or does not name it in turn (moe_unpermute,
// which has one map: is not there). It is left out; nothing outside the arrays is touched.
GK_DECLARE_CPU_LAUNCHER(moe_permute, MoePermuteArgs)
GK_DECLARE_CPU_LAUNCHER(moe_unpermute, MoeUnpermuteArgs)
GK_DECLARE_CPU_LAUNCHER(moe_unpermute_backward, MoeUnpermuteBackwardArgs)

// Returns a cudaError_t.
int build_permutation_cuda(const BuildPermutationArgs& args, void* stream);

}  // namespace grpo_kernels
