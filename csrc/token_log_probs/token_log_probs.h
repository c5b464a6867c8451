// Log-probs and entropy of rows of logits: argument structures and CPU launchers. On CUDA the op runs on Triton.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/macros.h"

namespace grpo_kernels {

// Rows of logits with a dense last axis: row r starts at element (r / inner) * outer_stride + (r % inner) *
// inner_stride.
struct LogitRows {
  int64_t rows, vocab;
  int64_t inner, outer_stride, inner_stride;
  int dtype;
};

// What stands between the caller's logits and the softmax, and which rows count. Per-row values have the arithmetic
// type: double for float64 logits, else float.
struct TokenTransform {
  const void* token_ids;     // [rows]; negative: masked
  int wide_ids;              // int64, else int32
  const uint8_t* mask;       // [rows] or null; 0: masked
  const void* temperatures;  // null: use `temperature`
  int temperature_per_row;   // [rows], else one value
  double temperature;
  double logit_scale;
  double softcap;  // 0: none
};

// Rows of the statistics that the forward leaves for the backward, each [rows]; after the transform.
enum RowStatistic : int { kRowMax = 0, kRowSum = 1, kRowTarget = 2, kRowWeighted = 3, kRowStatistics = 4 };

struct TokenLogProbsArgs {
  LogitRows layout;
  TokenTransform transform;
  const void* logits;
  void* log_probs;  // [rows] each; null: not wanted
  void* entropy;
  void* sum_squared_probs;
  int64_t* top1_ids;
  void* statistics;  // [4, rows]: max, sum of e^u, target logit, sum of u e^u, where u = z - max; NaN in broken rows
};

struct TokenLogProbsBackwardArgs {
  LogitRows layout;
  TokenTransform transform;
  const void* logits;
  const void* statistics;
  const void* grad_log_probs;  // [rows]; null: zero
  const void* grad_entropy;
  const void* grad_log_sum_exp;
  void* grad_logits;  // may be `logits`
  int64_t grad_outer_stride, grad_inner_stride;
};

GK_DECLARE_CPU_LAUNCHER(token_log_probs, TokenLogProbsArgs)
GK_DECLARE_CPU_LAUNCHER(token_log_probs_backward, TokenLogProbsBackwardArgs)

}  // namespace grpo_kernels
