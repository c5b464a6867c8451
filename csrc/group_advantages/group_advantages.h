// Group statistics: argument structures and launchers.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/macros.h"

namespace grpo_kernels {

// Which samples form a group. Equal groups: `group_size` neighbours, `order` and `sorted_ids` null. Ragged groups: sample
// indices sorted (stably) by group in `order`, their ids in `sorted_ids`; a group is a run of equal ids.
struct Grouping {
  int64_t batch;
  int64_t group_size;
  const int64_t* order;
  const int64_t* sorted_ids;
};

enum Baseline : int {
  kBaselineMean = 0,
  kBaselineLeaveOneOut = 1,
  kBaselineNone = 2,
  kBaselineLengthWeighted = 3,
  kBaselineSecondBest = 4
};
enum NormalizeBy : int { kNormalizeGroup = 0, kNormalizeBatch = 1, kNormalizeNone = 2, kNormalizeBatchTokens = 3 };
enum Aggregation : int { kSumThenNormalize = 0, kNormalizeThenSum = 1 };
enum Singleton : int { kSingletonZero = 0, kSingletonRaw = 1 };

struct GroupAdvantagesArgs {
  Grouping grouping;
  const void* rewards;    // [batch, functions], contiguous
  int dtype;              // of rewards
  int functions;          // R
  const double* weights;  // [R], or null for ones
  const double* lengths;  // [batch] tokens of each response; null where no option needs them
  int baseline, normalize_by, aggregation, singleton, correction;
  double eps, batch_eps;
  double* scratch;   // CPU: [2 batch]. CUDA: [batch], only where a batch statistic is asked for
  void* advantages;  // [batch] each, float64 if rewards are, else float32
  void* mean;
  void* std;
};

struct InformativeGroupsArgs {
  Grouping grouping;
  const void* rewards;  // [batch]
  int dtype;
  const uint8_t* mask;  // [batch] or null
  double tolerance;
  uint8_t* informative;  // [batch]
};

struct GroupRankArgs {
  Grouping grouping;
  const void* scores;  // [batch]
  int dtype;
  const uint8_t* valid;  // [batch] or null
  int32_t* rank;         // [batch]; 0 is the best, -1 is not valid
};

GK_DECLARE_CPU_LAUNCHER(group_advantages, GroupAdvantagesArgs)
GK_DECLARE_CPU_LAUNCHER(informative_groups, InformativeGroupsArgs)
GK_DECLARE_CPU_LAUNCHER(group_rank, GroupRankArgs)

// Each returns a cudaError_t.
int group_advantages_cuda(const GroupAdvantagesArgs& args, void* stream);
int informative_groups_cuda(const InformativeGroupsArgs& args, void* stream);
int group_rank_cuda(const GroupRankArgs& args, void* stream);

}  // namespace grpo_kernels
