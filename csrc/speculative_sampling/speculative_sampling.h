// Verification of drafted tokens: the arguments of its launcher.
#pragma once

#include "common/macros.h"

namespace grpo_kernels {

enum VerifyMode : int { kTokenRule = 0, kBlockRule = 1, kGreedyRule = 2 };

// Row (b, i) starts at element b * batch_stride + i * row_stride; its elements are neighbours.
struct LogitRowsOfDrafts {
  const void* data;
  int64_t batch_stride, row_stride;
};

struct VerifyDraftArgs {
  int64_t batch, drafts, vocab;
  int dtype;
  int mode;
  LogitRowsOfDrafts target;      // drafts + 1 rows a sequence
  LogitRowsOfDrafts draft;       // drafts rows a sequence; null data: each draft was certain
  const void* draft_ids;         // [batch, drafts]
  int wide_ids;                  // int64, else int32
  const int64_t* draft_lengths;  // [batch] each; null: drafts
  const void* temperatures;      // of the arithmetic type: double for float64 logits, else float; null: 1
  const int64_t* top_k;          // null: off
  const void* top_p;             // of the arithmetic type; null: off
  const int64_t* seeds;
  const int64_t* offsets;  // null: 0
  void* workspace;         // for each thread `workspace_stride` bytes, a multiple of 64 like the address
  int64_t workspace_stride;
  int64_t* token_ids;     // [batch, drafts + 1]
  int64_t* num_accepted;  // [batch]
  void* log_probs;        // [batch, drafts + 1] of the arithmetic type
};

// Returns the first row whose draft length, draft ids, temperature or top_p are out of range.
GK_DECLARE_CPU_LAUNCHER(verify_draft, VerifyDraftArgs)

}  // namespace grpo_kernels
