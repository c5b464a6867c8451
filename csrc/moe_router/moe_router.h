// The router: argument structures and launchers. The numbers of the options are those of grpo_kernels/moe_router/_native.py.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/macros.h"

namespace grpo_kernels {
namespace router {

constexpr int kMaxExperts = 1024;
constexpr int kMaxTopK = 32;

enum Scoring : int { kSoftmax = 0, kTopkSoftmax = 1, kSigmoid = 2, kSqrtSoftplus = 3 };
enum GroupScore : int { kTop2Sum = 0, kMax = 1 };
enum Loss : int { kZLoss = 0, kAuxLoss = 1, kSequenceLoss = 2, kLosses = 3 };
enum ReplayType : int { kUint8 = 0, kInt8 = 1, kInt16 = 2, kInt32 = 3, kInt64 = 4 };

// Places in the CPU's `counters`: these, then the number of live tokens of each sequence, then the counts of each sequence's
// experts. The last two only with the sequence-wise loss.
enum Counter : int { kLiveTokens = 0, kMismatches = 1, kFirstSequence = 2 };

}  // namespace router

// Rows of logits with a dense last axis. A stands for the arithmetic type: double for float64 logits, else float.
struct RouterRows {
  const void* logits;
  int64_t tokens, row_stride;
  int experts, top_k, dtype;
};

struct RouterOptions {
  int scoring;
  bool normalize;
  double scaling;                // > 0
  bool losses[router::kLosses];  // which are asked for
};

struct RouterSequences {
  const void* cu_seqlens;  // [count + 1], or null: count is 1, all tokens
  bool wide;               // int64, else int32
  int64_t count;
};

struct MoeRouterArgs {
  RouterRows rows;
  RouterOptions options;
  RouterSequences sequences;  // read for the sequence-wise loss alone
  int n_group, topk_group, group_score;
  const void* bias;      // [E] A, or null
  const uint8_t* mask;   // [T] or null; 0: masked
  const void* replay;    // [T, K] or null
  int replay_type;       // router::ReplayType
  void* topk_weights;    // [T, K] A
  int32_t* topk_ids;     // [T, K]; -1 in masked rows
  int32_t* per_expert;   // [E]
  void* losses;          // [3] A, in the order of router::Loss
  int32_t* mismatch;     // one number
  void* balance;         // [rows, E] A: d loss / d p. A row for the auxiliary loss, then one a sequence; as asked for
  int32_t* live_tokens;  // one number
  double* workspace;     // workspace_size() of workspace.h, any content
  uint32_t* counters;    // counters_size() of workspace.h, any content; of the CPU
};

struct MoeRouterBackwardArgs {
  RouterRows rows;
  RouterOptions options;
  RouterSequences sequences;
  const void* topk_weights;  // [T, K] A; NaN in broken rows
  const int32_t* topk_ids;   // [T, K]; -1 in masked rows
  const void* balance;
  const int32_t* live_tokens;
  const void* grad_weights;  // [T, K] A, or null: zero
  const void* grad_losses;   // [3] A, or null: zero
  void* grad_logits;         // [T, E], dense, of the logits' type
};

// The forward returns -1, or t for a token whose replay is faulty (the first such), or T + s for a sequence s that is (count of
// sequences: T + max(s, 0)).
GK_DECLARE_CPU_LAUNCHER(moe_router, MoeRouterArgs)
GK_DECLARE_CPU_LAUNCHER(moe_router_backward, MoeRouterBackwardArgs)

// Each returns a cudaError_t. There is no float64 here.
int moe_router_cuda(const MoeRouterArgs& args, void* stream);
int moe_router_backward_cuda(const MoeRouterBackwardArgs& args, void* stream);

}  // namespace grpo_kernels
