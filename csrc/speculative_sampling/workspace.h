// What a thread of verify_draft remembers: of each draft two softmaxes; where there are filters a key and a mass for each
// token, and the maxima of groups of tokens.
#pragma once

#include "common/macros.h"

namespace grpo_kernels {
namespace GK_ISA {

constexpr int64_t kDraftBytes = 128;
constexpr int64_t kFilterGroup = 64;

// Of `count` values, a multiple of 64.
GK_HOST_DEVICE int64_t filter_bytes(int64_t count, int64_t element_size) { return (count * element_size + 63) / 64 * 64; }

GK_HOST_DEVICE int64_t workspace_bytes(int64_t drafts, int64_t vocab, int64_t element_size, bool filters) {
  const int64_t groups = (vocab + kFilterGroup - 1) / kFilterGroup;
  return drafts * kDraftBytes + (filters ? 2 * filter_bytes(vocab, element_size) + filter_bytes(groups, element_size) : 0);
}

}  // namespace GK_ISA
}  // namespace grpo_kernels
