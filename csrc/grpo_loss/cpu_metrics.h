// What the CPU kernel adds to a record for a block of tokens. Each sum is a loop over arrays in the first-level cache.
#pragma once

#include "grpo_loss/cpu_block.h"

namespace grpo_kernels {
namespace GK_ISA {
namespace loss_kernels {

// --- sums --------------------------------------------------------------------------------------------------------------------

template <typename T>
double sum_live(const T* x, const T* live, int64_t count) {
  double sum = 0.0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += double(live[i] != T(0) ? x[i] : T(0));
  return sum;
}

template <typename T>
double sum_squares(const T* x, const T* live, int64_t count) {
  double sum = 0.0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) {
    const double value = double(live[i] != T(0) ? x[i] : T(0));
    sum += value * value;
  }
  return sum;
}

// Exact: at most 256 ones.
template <typename T>
double count_live(const T* flags, const T* live, int64_t count) {
  T sum = T(0);
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += live[i] != T(0) ? flags[i] : T(0);
  return double(sum);
}

// Minimum and maximum into the record; NaN is no extreme.
template <typename T>
void add_extremes(const T* x, const T* live, int64_t count, double* minimum, double* maximum) {
  T low = infinity<T>(), high = -infinity<T>();
#pragma omp simd reduction(min : low) reduction(max : high)
  for (int64_t i = 0; i < count; ++i) {
    const T small = live[i] != T(0) ? x[i] : infinity<T>();
    const T large = live[i] != T(0) ? x[i] : -infinity<T>();
    low = small < low ? small : low;
    high = large > high ? large : high;
  }
  if (minimum != nullptr && double(low) < *minimum) *minimum = double(low);
  if (double(high) > *maximum) *maximum = double(high);
}

template <typename T>
void add_flags(const Problem<T>& p, int64_t count, const Block<T>& b, double* record) {
  const LossOptions<T> o = p.o;
  const bool bounds_divergence = o.bounds_divergence();
  const T* clipped = o.surrogate == kGMPO ? b.log_ratio : (bounds_divergence ? b.moved : b.ratio);
  const T* bounded = bounds_divergence ? b.capped : b.ratio;
  T tokens = 0, nonfinite = 0, low = 0, high = 0, capped = 0, zero = 0;
#pragma omp simd reduction(+ : tokens, nonfinite, low, high, capped, zero)
  for (int64_t i = 0; i < count; ++i) {
    const TokenFlags<T> f = token_flags(o, b.loss[i], b.advantage[i], clipped[i], bounded[i]);
    const bool live = b.live[i] != T(0);
    tokens += b.live[i];
    nonfinite += live ? f.nonfinite : T(0);
    low += live ? f.clip_low : T(0);
    high += live ? f.clip_high : T(0);
    capped += live ? f.capped : T(0);
    zero += live ? f.zero_advantage : T(0);
  }
  record[kTokens] += double(tokens);
  record[kNonfinite] += double(nonfinite);
  record[kClipLow] += double(low);
  record[kClipHigh] += double(high);
  record[kCapped] += double(capped);
  record[kZeroAdvantage] += double(zero);
}

template <typename T>
void add_metrics(const Problem<T>& p, int64_t count, const Block<T>& b, double* record) {
  add_flags(p, count, b, record);
  record[kTokenLoss] += sum_live(b.loss, b.live, count);
  record[kPolicyLoss] += sum_live(b.policy, b.live, count);
  record[kLogRatio] += sum_live(b.log_ratio, b.live, count);
  record[kRatio] += sum_live(b.ratio, b.live, count);
  record[kRatioSquared] += sum_squares(b.ratio, b.live, count);
  add_extremes(b.ratio, b.live, count, &record[kRatioMin], &record[kRatioMax]);
  record[kHighEntropy] += count_live(b.kept, b.live, count);
  if (p.given(kRefLogProbs)) record[kKL] += sum_live(b.kl, b.live, count);
  if (p.given(kTokenEntropy)) {
    record[kEntropy] += sum_live(b.entropy, b.live, count);
    record[kEntropyBonus] += sum_live(b.entropy, b.kept, count);
  }
  if (p.given(kSelection)) record[kCapped] += count_live(b.selected, b.live, count);
  if (p.o.off_policy_mask) record[kOffPolicyDropped] += count_live(b.dropped, b.live, count);
  if (p.o.surrogate == kVESPO) record[kVESPOWeight] += sum_live(b.phi, b.live, count);
  if (!p.given(kSamplerLogProbs)) return;
  record[kSamplerWeight] += sum_live(b.sampler_weight, b.live, count);
  record[kSamplerWeightSquared] += sum_squares(b.sampler_weight, b.live, count);
  add_extremes(b.sampler_weight, b.live, count, &record[kSamplerWeightMin], &record[kSamplerWeightMax]);
  record[kSamplerGap] += sum_live(b.sampler_gap, b.scored, count);
  record[kSamplerScored] += count_live(b.scored, b.live, count);
  add_extremes(b.sampler_gap, b.scored, count, nullptr, &record[kSamplerGapMax]);
}

}  // namespace loss_kernels
}  // namespace GK_ISA
}  // namespace grpo_kernels
