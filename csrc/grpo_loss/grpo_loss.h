// Arguments and launchers of the GRPO loss. The numbers of the options and metrics are those of
// grpo_kernels/grpo_loss/config.py and metrics.py.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/macros.h"

namespace grpo_kernels {
namespace loss {

enum Surrogate : int {
  kPPOClip = 0,
  kCISPO = 1,
  kSAPO = 2,
  kVESPO = 3,
  kReinforce = 4,
  kGMPO = 5,
  kDPPOTV = 6,
  kDPPOKL = 7,
  kDRO = 8,
  kClipCov = 9,
  kKLCov = 10
};
enum RatioLevel : int { kTokenLevel = 0, kSequenceLevel = 1, kSequenceTokenLevel = 2 };
enum Reduction : int {
  kTokenMean = 0,
  kSequenceMeanTokenMean = 1,
  kSequenceMeanTokenSum = 2,
  kSequenceMeanTokenSumNorm = 3,
  kNoReduction = 4,
  kTokenSum = 5
};
enum KLEstimator : int { kK1 = 0, kK2 = 1, kK3 = 2, kAbsolute = 3, kNoKL = 4 };
enum SamplerCorrection : int {
  kNoCorrection = 0,
  kTokenTruncate = 1,
  kTokenMask = 2,
  kSequenceTruncate = 3,
  kSequenceMask = 4
};

// Places in `options` and `parameters`.
enum LossOption : int {
  kSurrogate,
  kRatioLevel,
  kReduction,
  kKLEstimator,
  kKLStraightThrough,
  kKLImportanceWeighted,
  kSamplerCorrection,
  kPresent,  // bit i: parameter i is given
  kSkipEmptySequences,
  kEntropyThroughReduction,
  kLossOptions
};
enum LossParameter : int {
  kRatioLow,
  kRatioHigh,
  kDelta,
  kDualClip,
  kKLLogRatioClamp,
  kKLValueClamp,
  kSamplerCap,
  kSamplerFloor,
  kOffPolicyThreshold,
  kLogRatioMin,
  kLogRatioMax,
  kSAPOTauPos,
  kSAPOTauNeg,
  kVESPOKPos,
  kVESPOLambdaPos,
  kVESPOKNeg,
  kVESPOLambdaNeg,
  kDROBeta,
  kKLCovCoef,
  kLossParameters
};

// The metrics as the caller gets them. A record of partial sums has the same slots, but for three that only the kernels know.
enum LossMetric : int {
  kTokens = 0,
  kSequences = 1,
  kTotalTokens = 2,
  kNonfinite = 3,
  kPolicyLoss = 4,
  kKL = 5,
  kEntropy = 6,
  kLogRatio = 7,
  kRatio = 8,
  kRatioSquared = 9,
  kClipLow = 10,
  kClipHigh = 11,
  kCapped = 12,
  kClipLowRows = 13,
  kClipHighRows = 14,
  kSamplerWeight = 15,
  kSamplerWeightSquared = 16,
  kSamplerGap = 17,
  kSamplerScored = 18,
  kOffPolicyDropped = 19,
  kHighEntropy = 20,
  kZeroAdvantage = 21,
  kVESPOWeight = 22,
  kRatioMin = 23,
  kSamplerWeightMin = 24,
  kClipLowRowMin = 25,
  kRatioMax = 26,
  kSamplerWeightMax = 27,
  kSamplerGapMax = 28,
  kClipHighRowMax = 29,
  kLossMetrics = 30,
  kTokenLoss = kTotalTokens,  // in a record: the sum of the token losses, times the factors of their rows
  kEntropyBonus = 30,         // the sum of the entropies that the bonus counts, times those factors where the loss reduces it
  kThrough = 31,              // the sum of what reaches the sequence's log-ratio
  kRecord = 32
};

// What a row's statistics are made of, in double. The log-ratios of "gmpo" are clipped.
enum LossRowSum : int { kRowTokens, kRowLogRatio, kRowSamplerGap, kRowOffPolicy, kRowVESPO, kRowSums };

// Places in `tensors`.
enum LossInput : int {
  kLogProbs,
  kOldLogProbs,
  kAdvantages,
  kMask,
  kRefLogProbs,
  kSamplerLogProbs,
  kTokenWeights,
  kTokenEntropy,
  kSelection,  // 1 where "clip_cov" or "kl_cov" treats the token differently, else 0
  kUpstream,
  kLossInputs
};

// Places in `numbers`.
enum LossNumber : int { kKLCoef, kEntropyCoef, kNumItems, kEntropyThreshold, kLossNumbers };

}  // namespace loss

// Token t of row r lies at data[r * row_stride + t * token_stride]. Packed rows have t from 0 to N and, if they are per token,
// row_stride 0. data is null for an absent tensor. token_stride is 0 (one value a sequence) or 1.
struct LossTensor {
  const void* data;
  int64_t row_stride;
  int64_t token_stride;
};

// A number that is on the host, or on the device when `data` is not null.
struct LossScalar {
  const void* data;
  double value;
};

// Where the tokens of the sequences are: [batch, tokens], or `tokens` packed ones.
struct LossLayout {
  int64_t batch;
  int64_t tokens;          // T, or N
  const void* cu_seqlens;  // [batch + 1] or null
  bool wide_cu_seqlens;    // int64, not int32
};

struct GRPOLossArgs {
  LossLayout layout;
  int dtype;  // of all floating tensors: kFloat32 or, on the CPU, kFloat64
  LossTensor tensors[loss::kLossInputs];
  int mask_bytes;                          // size of its integers: 1, 4 or 8
  LossScalar numbers[loss::kLossNumbers];  // the entropy threshold has data or is absent
  int64_t max_length;
  int options[loss::kLossOptions];
  double parameters[loss::kLossParameters];
  double* workspace;   // workspace_size() doubles of segments.h, any content
  uint32_t* counters;  // CUDA: count_counters() of segments.h; the launcher zeroes them
  // Outputs; null where not wanted. Per-token ones are contiguous.
  void* loss;  // one number; per token without a reduction
  void* grad_log_probs;
  void* grad_entropy;
  void* scale;     // [2]; null without a reduction
  float* metrics;  // [30]; null with upstream gradients
};

GK_DECLARE_CPU_LAUNCHER(grpo_loss, GRPOLossArgs)

// Returns a cudaError_t. float32 only.
int grpo_loss_cuda(const GRPOLossArgs& args, void* stream);

}  // namespace grpo_kernels
