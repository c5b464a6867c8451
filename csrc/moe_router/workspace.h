// How much scratch the router's forward needs; static, so that it is known before any data is.
#pragma once

#include "moe_router/pieces.h"

namespace grpo_kernels {
namespace GK_ISA {
namespace router_kernels {

// Tokens that a task of the CPU takes; of T alone, so that sums do not depend on the number of threads.
GK_HOST_DEVICE int64_t tokens_per_task(int64_t tokens, int experts) {
  const int64_t few = 16384 / experts < 8 ? 8 : 16384 / experts;
  const int64_t many = (tokens + 1023) / 1024;  // at most 1024 tasks: their sums over columns must stay small
  return few > many ? few : many;
}

GK_HOST_DEVICE int64_t tasks(int64_t tokens, int experts) {
  const int64_t size = tokens_per_task(tokens, experts);
  return (tokens + size - 1) / size;
}

// In doubles. CUDA: the sums of pieces.h. CPU: the z-loss of each task, then E sums over columns for each stretch of a task
// within one sequence.
GK_HOST_DEVICE int64_t workspace_size(int64_t tokens, int experts, int64_t sequences, const bool* losses, bool cuda) {
  if (cuda) {
    Pieces pieces = cut_tokens(tokens, experts, true, sequences, losses);
    return (lay_out(pieces, experts, losses, nullptr) + int64_t(sizeof(double)) - 1) / int64_t(sizeof(double));
  }
  const int64_t count = tasks(tokens, experts);
  const int64_t stretches = losses[router::kSequenceLoss] ? count + sequences : count;
  const bool columns = losses[router::kAuxLoss] || losses[router::kSequenceLoss];
  return count + (columns ? stretches * experts : 0);
}

// Of the CPU.
GK_HOST_DEVICE int64_t counters_size(int experts, int64_t sequences, const bool* losses) {
  return router::kFirstSequence + (losses[router::kSequenceLoss] ? sequences * (experts + 1) : 0);
}

}  // namespace router_kernels
}  // namespace GK_ISA
}  // namespace grpo_kernels
