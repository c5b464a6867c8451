// Partial sums of the loss and its metrics: what a token adds, how records merge, and what the totals mean.
//
// A record holds 32 doubles in the order of the metrics: sums, then minima (23 to 25), maxima (26 to 29), and two more sums.
// The slots that are taken by row (sequences and clip shares) stay empty until all segments of a row have been counted.
#pragma once

#include "grpo_loss/policy.h"
#include "grpo_loss/segments.h"

namespace grpo_kernels {
namespace GK_ISA {
namespace loss_kernels {

GK_HOST_DEVICE bool is_minimum(int slot) { return slot >= kRatioMin && slot <= kClipLowRowMin; }
GK_HOST_DEVICE bool is_maximum(int slot) { return slot >= kRatioMax && slot <= kClipHighRowMax; }

// The record of nothing.
GK_HOST_DEVICE double empty_slot(int slot) {
  return is_minimum(slot) ? infinity<double>() : (is_maximum(slot) ? -infinity<double>() : 0.0);
}

// NaN is no extreme.
GK_HOST_DEVICE double merge_slot(int slot, double total, double value) {
  if (is_minimum(slot)) return value < total ? value : total;
  if (is_maximum(slot)) return value > total ? value : total;
  return total + value;
}

// What a token is counted for: 0 or 1 each. `clipped` is what the clip bounds, as a rule the ratio; `capped` the ratio, or 0
// where another bound took it before.
template <typename T>
struct TokenFlags {
  T nonfinite, clip_low, clip_high, capped, zero_advantage;
};

template <typename T>
GK_HOST_DEVICE TokenFlags<T> token_flags(const LossOptions<T>& o, T loss, T advantage, T clipped, T capped) {
  const bool positive = advantage > T(0), negative = advantage < T(0);
  const bool low = negative & (clipped < o.ratio_low), high = positive & (clipped > o.ratio_high);
  const bool held = (capped > o.delta) | (negative & (capped > o.dual_clip));
  const bool finite = loss - loss == T(0);
  return {finite ? T(0) : T(1), low ? T(1) : T(0), high ? T(1) : T(0), held ? T(1) : T(0), advantage == T(0) ? T(1) : T(0)};
}

// The gap of a token to the sampler, as the metrics see it; one without both log-probs is not scored.
template <typename T>
struct SamplerGap {
  T size;
  T scored;  // 0 or 1
};

template <typename T>
GK_HOST_DEVICE SamplerGap<T> sampler_gap(T old, T sampler) {
  const T value = gap(old, sampler).value;
  return {magnitude(evidence(old, sampler)), value == value ? T(1) : T(0)};
}

// What a row adds to slot `slot` of the totals.
GK_HOST_DEVICE double row_slot(int slot, double tokens, double clip_low, double clip_high) {
  if (!(tokens > 0.0)) return empty_slot(slot);
  if (slot == kSequences) return 1.0;
  if (slot == kClipLowRows || slot == kClipLowRowMin) return clip_low / tokens;
  if (slot == kClipHighRows || slot == kClipHighRowMax) return clip_high / tokens;
  return empty_slot(slot);
}

template <typename T>
GK_HOST_DEVICE T read_number(const LossScalar& number) {
  return number.data == nullptr ? T(number.value) : *static_cast<const T*>(number.data);
}

// The factors of the sums of token losses and of entropies.
GK_HOST_DEVICE double loss_scale(const GRPOLossArgs& a, int reduction, double tokens, double sequences, double num_items) {
  const bool given = num_items > 0.0;
  if (reduction == kTokenSum) return 1.0;
  if (reduction == kTokenMean) return 1.0 / (given ? num_items : at_least_one(tokens));
  const double length = double(a.max_length > 0 ? a.max_length : (a.layout.tokens > 0 ? a.layout.tokens : 1));
  const double rows = given ? num_items : at_least_one(sequences);
  return 1.0 / (reduction == kSequenceMeanTokenSumNorm ? rows * length : rows);
}

// Writes the loss, its factors and the metrics from the totals of all rows.
template <typename T>
GK_HOST_DEVICE void write_results(const GRPOLossArgs& a, const LossOptions<T>& o, const double* totals) {
  for (int slot = 0; slot < kLossMetrics; ++slot) a.metrics[slot] = float(totals[slot]);
  const int64_t rows = a.layout.cu_seqlens == nullptr ? a.layout.batch : 1;
  a.metrics[kTotalTokens] = float(rows * a.layout.tokens);
  if (o.reduction == kNoReduction) return;
  const double entropy_coef = double(read_number<T>(a.numbers[kEntropyCoef]));
  const bool bonus = a.tensors[kTokenEntropy].data != nullptr && entropy_coef != 0.0;
  const double sequences = o.skips_empty ? totals[kSequences] : double(a.layout.batch);
  const double num_items = double(read_number<T>(a.numbers[kNumItems]));
  const double scale = loss_scale(a, o.reduction, totals[kTokens], sequences, num_items);
  const double entropy_weight = o.reduces_entropy ? -entropy_coef * scale : -entropy_coef / at_least_one(totals[kHighEntropy]);
  const double entropy_scale = bonus ? entropy_weight : 0.0;
  static_cast<T*>(a.scale)[0] = T(scale);
  static_cast<T*>(a.scale)[1] = T(entropy_scale);
  const double entropy_part = entropy_scale == 0.0 ? 0.0 : entropy_scale * totals[kEntropyBonus];
  *static_cast<T*>(a.loss) = T(scale * totals[kTokenLoss] + entropy_part);
}

}  // namespace loss_kernels
}  // namespace GK_ISA
}  // namespace grpo_kernels
