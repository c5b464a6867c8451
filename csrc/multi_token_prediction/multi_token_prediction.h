// Targets of multi-token prediction on the CPU: argument structure and launcher. On CUDA they run on Triton.
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace grpo_kernels {

// Row i of depth k predicts the token of row i + k + shift, if both are of one document and that token counts.
struct MtpTargetsArgs {
  const void* token_ids;  // [rows]
  int wide_ids;           // int64, else int32
  const void* positions;  // [rows], of a row in its document, negative: of none. Null: only sequence_length ends documents
  int wide_positions;
  const uint8_t* mask;  // [rows]; null: all tokens count
  int64_t rows;
  int64_t depths;
  int64_t shift;            // at most `rows`
  int64_t sequence_length;  // documents end at multiples of this; 0: they do not
  int64_t ignore_index;     // such a token does not count, nor does a negative one
  int64_t* targets;         // [depths, rows]; -1: nothing
  int64_t* counts;          // [depths]; targets that are not -1
};

GK_DECLARE_CPU_LAUNCHER(mtp_targets, MtpTargetsArgs)  // no fault

}  // namespace grpo_kernels
