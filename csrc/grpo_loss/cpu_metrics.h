// What the CPU kernel adds to a record for a block of tokens, from arrays in the first-level cache. Counts are padded: see
// cpu_block.h.
#pragma once

#include "grpo_loss/cpu_block.h"

namespace grpo_kernels {
namespace GK_ISA {
namespace loss_kernels {

// --- sums --------------------------------------------------------------------------------------------------------------------

template <typename T>
double sum_live(const T* x, const T* live, int64_t count) {
  return sum_terms(live, count, [=](int64_t i) { return x[i]; });
}

template <typename T>
double sum_squares(const T* x, const T* live, int64_t count) {
  alignas(64) double sums[kLanes] = {};
  for (int64_t i = 0; i < count; i += kLanes) {
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) {
      const double value = double(live[i + l] != T(0) ? x[i + l] : T(0));
      sums[l] = multiply_add(value, value, sums[l]);
    }
  }
  return sum_lanes(sums);
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

// Returns the number of live tokens.
template <typename T>
double add_flags(const Problem<T>& p, int64_t count, const Block<T>& b, double* record) {
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
  return double(tokens);
}

// Sets what every configuration sums to zero in masked tokens: GCC vectorises no loop that selects and converts.
template <typename T>
void mask_sums(int64_t count, Block<T>& b) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    b.loss[i] = b.live[i] != T(0) ? b.loss[i] : T(0);
    b.log_ratio[i] = b.live[i] != T(0) ? b.log_ratio[i] : T(0);
    b.ratio[i] = b.live[i] != T(0) ? b.ratio[i] : T(0);
  }
}

// The sums that every configuration has, in one loop. Returns that of the losses.
template <typename T>
double add_sums(int64_t count, const Block<T>& b, double* record) {
  alignas(64) double losses[kLanes] = {}, log_ratios[kLanes] = {}, ratios[kLanes] = {}, squares[kLanes] = {};
  for (int64_t i = 0; i < count; i += 2 * kLanes) {
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) {
      const int64_t j = i + l, k = j + kLanes;
      const double first = double(b.ratio[j]), second = double(b.ratio[k]);
      losses[l] += double(b.loss[j]) + double(b.loss[k]);
      log_ratios[l] += double(b.log_ratio[j]) + double(b.log_ratio[k]);
      ratios[l] += first + second;
      squares[l] += multiply_add(first, first, second * second);
    }
  }
  record[kLogRatio] += sum_lanes(log_ratios);
  record[kRatio] += sum_lanes(ratios);
  record[kRatioSquared] += sum_lanes(squares);
  return sum_lanes(losses);
}

template <typename T>
void add_metrics(const Problem<T>& p, int64_t count, Block<T>& b, double* record) {
  const double tokens = add_flags(p, count, b, record);
  add_extremes(b.ratio, b.live, count, &record[kRatioMin], &record[kRatioMax]);
  mask_sums(count, b);
  const double loss = add_sums(count, b, record);
  record[kTokenLoss] += loss;
  record[kPolicyLoss] += p.given(kRefLogProbs) ? sum_live(b.policy, b.live, count) : loss;
  record[kHighEntropy] += p.masks_by_entropy() ? count_live(b.kept, b.live, count) : tokens;
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
