// Where documents end, and which tokens count.
#pragma once

#include "multi_token_prediction/multi_token_prediction.h"

namespace grpo_kernels {
namespace GK_ISA {

// The row behind the sequence of a row: no document reaches further.
GK_HOST_DEVICE int64_t sequence_end(int64_t row, int64_t rows, int64_t sequence_length) {
  if (sequence_length <= 0 || sequence_length >= rows) return rows;
  const int64_t end = (row / sequence_length + 1) * sequence_length;
  return end < rows ? end : rows;
}

// Whether a row goes on the document of the row before, by the positions of both. Nothing overflows.
GK_HOST_DEVICE bool goes_on(int64_t before, int64_t position) { return before >= 0 && position > 0 && position - 1 == before; }

GK_HOST_DEVICE bool token_counts(int64_t id, int64_t ignore_index) { return id >= 0 && id != ignore_index; }

}  // namespace GK_ISA
}  // namespace grpo_kernels
