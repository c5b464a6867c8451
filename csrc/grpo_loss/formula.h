// The maths of the GRPO loss for one token and one row, in T = float or double, for the CPU and CUDA kernels alike.
//
// Everything is written as selections without branches on data, so that a loop over tokens vectorises; the options are uniform.
// Optional bounds that are absent are infinite. Derivatives are by the token's log-prob: `direct`, plus `through` the log-ratio
// of the token or, at sequence level, of its row. Infinities must not meet zeros: a clipped or weightless token has derivative
// 0 even if its ratio is infinite.
#pragma once

#include "common/math.h"
#include "grpo_loss/grpo_loss.h"

namespace grpo_kernels {
namespace GK_ISA {
namespace loss_kernels {

using namespace loss;

constexpr double kLogWeightMin = -18.420680743952367;  // log 1e-8: bounds of the log-weights of "vespo"
constexpr double kLogWeightMax = 20.0;
constexpr double kGapLimit = 1e4;

template <typename T>
GK_HOST_DEVICE T infinity() {
  return T(bits_to_float(0x7f800000u));
}

GK_HOST_DEVICE float magnitude(float x) { return ::fabsf(x); }
GK_HOST_DEVICE double magnitude(double x) { return ::fabs(x); }

template <typename T>
GK_HOST_DEVICE bool is_infinite(T x) {
  return magnitude(x) == infinity<T>();
}

// NaN stays NaN.
template <typename T>
GK_HOST_DEVICE T clamp(T x, T low, T high) {
  return x < low ? low : (x > high ? high : x);
}

// a - b, and its derivative by a: equal infinities have no gap. (A flag in a structure would keep GCC from vectorising.)
template <typename T>
struct Gap {
  T value;
  T slope;  // 0 or 1
};

template <typename T>
GK_HOST_DEVICE Gap<T> gap(T a, T b) {
  const bool stuck = (a == b) & is_infinite(a);
  return {stuck ? T(0) : a - b, stuck ? T(0) : T(1)};
}

// weight * x, where zero wins over infinity: a factor that meets zero is bounded first. (Selecting the product instead tempts
// GCC into branches, and the loop does not vectorise.)
template <typename T>
GK_HOST_DEVICE T times(T weight, T x) {
  const T bounded_weight = x == T(0) ? clamp(weight, T(-1), T(1)) : weight;
  const T bounded_x = weight == T(0) ? clamp(x, T(-1), T(1)) : x;
  return bounded_weight * bounded_x;
}

// a - b of stored log-probs, bounded; one that is missing (NaN) is no evidence of a gap.
template <typename T>
GK_HOST_DEVICE T evidence(T a, T b) {
  const T value = gap(a, b).value;
  return value != value ? T(0) : clamp(value, T(-kGapLimit), T(kGapLimit));
}

template <typename T>
struct LossOptions {
  int surrogate, reduction, estimator, correction;
  bool sequence_ratio;   // the ratio is one of the row
  bool shares_gradient;  // and its derivative reaches all tokens of the row
  bool off_policy_mask, clamps_log_ratio, skips_empty, reduces_entropy;
  T straight_through, importance_weighted;  // 0 or 1: GCC does not vectorise a choice by a uniform bool
  T ratio_low, ratio_high, delta, dual_clip, kl_log_ratio_clamp, kl_value_clamp;
  T sampler_floor, sampler_cap, log_sampler_floor, log_sampler_cap, off_policy_threshold;
  T log_ratio_min, log_ratio_max;
  T tau_pos, tau_neg, k_pos, lambda_pos, k_neg, lambda_neg, dro_beta, kl_cov_coef;

  GK_HOST_DEVICE bool corrects_tokens() const { return correction == kTokenTruncate || correction == kTokenMask; }
  GK_HOST_DEVICE bool corrects_sequences() const { return correction == kSequenceTruncate || correction == kSequenceMask; }
  GK_HOST_DEVICE bool truncates() const { return correction == kTokenTruncate || correction == kSequenceTruncate; }
  GK_HOST_DEVICE bool bounds_divergence() const { return surrogate == kDPPOTV || surrogate == kDPPOKL; }
  GK_HOST_DEVICE bool masks() const { return correction == kTokenMask || correction == kSequenceMask; }

  // Whether a token's loss or gradient needs statistics of its row.
  GK_HOST_DEVICE bool needs_row_sums() const {
    return sequence_ratio || reduction == kSequenceMeanTokenMean || off_policy_mask || surrogate == kVESPO ||
           corrects_sequences();
  }
};

template <typename T>
inline LossOptions<T> make_options(const GRPOLossArgs& a) {
  const int* option = a.options;
  const auto given = [&](int i) { return (option[kPresent] >> i & 1) != 0; };
  const auto number = [&](int i) { return T(a.parameters[i]); };
  const auto lower = [&](int i) { return given(i) ? number(i) : -infinity<T>(); };
  const auto upper = [&](int i) { return given(i) ? number(i) : infinity<T>(); };
  LossOptions<T> o{};
  o.surrogate = option[kSurrogate];
  o.reduction = option[kReduction];
  o.estimator = a.tensors[kRefLogProbs].data == nullptr ? int(kNoKL) : option[kKLEstimator];
  o.correction = a.tensors[kSamplerLogProbs].data == nullptr ? int(kNoCorrection) : option[kSamplerCorrection];
  o.sequence_ratio = option[kRatioLevel] != kTokenLevel || o.surrogate == kGMPO;
  o.shares_gradient = option[kRatioLevel] == kSequenceLevel || o.surrogate == kGMPO;
  o.clamps_log_ratio = given(kLogRatioMin) || given(kLogRatioMax);
  o.skips_empty = option[kSkipEmptySequences] != 0;
  o.reduces_entropy = option[kEntropyThroughReduction] != 0;
  o.straight_through = option[kKLStraightThrough] != 0 ? T(1) : T(0);
  o.importance_weighted = option[kKLImportanceWeighted] != 0 ? T(1) : T(0);
  o.off_policy_mask = given(kOffPolicyThreshold);
  o.ratio_low = lower(kRatioLow);
  o.ratio_high = upper(kRatioHigh);
  o.delta = upper(kDelta);
  o.dual_clip = upper(kDualClip);
  o.kl_log_ratio_clamp = upper(kKLLogRatioClamp);
  o.kl_value_clamp = upper(kKLValueClamp);
  o.sampler_floor = lower(kSamplerFloor);
  o.sampler_cap = upper(kSamplerCap);
  o.log_sampler_floor = given(kSamplerFloor) ? T(::log(a.parameters[kSamplerFloor])) : -infinity<T>();
  o.log_sampler_cap = given(kSamplerCap) ? T(::log(a.parameters[kSamplerCap])) : infinity<T>();
  o.off_policy_threshold = number(kOffPolicyThreshold);
  o.log_ratio_min = lower(kLogRatioMin);
  o.log_ratio_max = upper(kLogRatioMax);
  o.tau_pos = number(kSAPOTauPos);
  o.tau_neg = number(kSAPOTauNeg);
  o.k_pos = number(kVESPOKPos);
  o.lambda_pos = number(kVESPOLambdaPos);
  o.k_neg = number(kVESPOKNeg);
  o.lambda_neg = number(kVESPOLambdaNeg);
  o.dro_beta = number(kDROBeta);
  o.kl_cov_coef = number(kKLCovCoef);
  return o;
}

// A token's log-ratio within its bounds; outside it has no slope.
template <typename T>
GK_HOST_DEVICE Gap<T> bounded(const LossOptions<T>& o, const Gap<T>& g) {
  const bool outside = (g.value < o.log_ratio_min) | (g.value > o.log_ratio_max);
  return {clamp(g.value, o.log_ratio_min, o.log_ratio_max), outside ? T(0) : g.slope};
}

// "sequence_token": the derivative of a token's log-prob in the place of its row's log-ratio.
template <typename T>
GK_HOST_DEVICE T own_slope(T log_prob) {
  return is_infinite(log_prob) ? T(0) : T(1);
}

// --- the sampler's mismatch --------------------------------------------------------------------------------------------------

// The weight that corrects it, from the plain weight exp(old - sampler).
template <typename T>
GK_HOST_DEVICE T sampler_weight(const LossOptions<T>& o, T raw) {
  const bool outside = (raw < o.sampler_floor) | (raw > o.sampler_cap);
  return o.truncates() ? clamp(raw, o.sampler_floor, o.sampler_cap) : (o.masks() & outside ? T(0) : raw);
}

// Its logarithm, bounded for "vespo", from a token's gap.
template <typename T>
GK_HOST_DEVICE T log_sampler_weight(const LossOptions<T>& o, T gap) {
  const T raw = fast_exp(gap);
  const bool outside = (raw < o.sampler_floor) | (raw > o.sampler_cap);
  const T log_weight =
      o.truncates() ? clamp(gap, o.log_sampler_floor, o.log_sampler_cap) : (o.masks() & outside ? -infinity<T>() : gap);
  return clamp(log_weight, T(kLogWeightMin), T(kLogWeightMax));
}

// --- a row -------------------------------------------------------------------------------------------------------------------

// What every token of a row shares.
template <typename T>
struct RowState {
  T factor;            // of the reduction
  T ratio;             // sequence level
  T sampler_weight;    // sequence modes
  T off_policy;        // 1 if the off-policy mask drops what has a negative advantage, else 0
  T phi_pos, phi_neg;  // "vespo": by the sign of the advantage
  T held;              // 1 if a clamp of the log-ratio takes the ratio's derivative, else 0
};

// The state of rows whose statistics nobody needs.
template <typename T>
GK_HOST_DEVICE RowState<T> plain_row() {
  return {T(1), T(1), T(1), T(0), T(1), T(1), T(0)};
}

// exp(lambda + k log w - lambda w), the gamma weight that is 1 at w = 1.
GK_HOST_DEVICE double vespo_phi(double log_weight, double k, double lambda) {
  const double phi = ::exp(lambda + k * log_weight - lambda * ::exp(log_weight));
  return phi - phi == 0.0 ? phi : 0.0;
}

GK_HOST_DEVICE double at_least_one(double count) { return count > 1.0 ? count : 1.0; }

// The weight of a row's tokens in the sum that the loss is.
GK_HOST_DEVICE double row_factor(int reduction, double tokens) {
  return reduction == kSequenceMeanTokenMean ? 1.0 / at_least_one(tokens) : 1.0;
}

// In double, since every token of the row inherits the error.
template <typename T>
GK_HOST_DEVICE RowState<T> row_state(const LossOptions<T>& o, const double* sums) {
  const double tokens = at_least_one(sums[kRowTokens]);
  RowState<T> row = plain_row<T>();
  row.factor = T(row_factor(o.reduction, tokens));
  if (o.sequence_ratio) {
    const double mean = sums[kRowLogRatio] / tokens, low = double(o.log_ratio_min), high = double(o.log_ratio_max);
    row.ratio = T(::exp(clamp(mean, low, high)));
    row.held = (mean < low) | (mean > high) ? T(1) : T(0);
  }
  if (o.corrects_sequences()) row.sampler_weight = sampler_weight(o, T(::exp(sums[kRowSamplerGap])));
  if (o.off_policy_mask) row.off_policy = T(sums[kRowOffPolicy] / tokens) <= o.off_policy_threshold ? T(0) : T(1);
  if (o.surrogate == kVESPO) {
    const double log_weight = clamp(sums[kRowVESPO], kLogWeightMin, kLogWeightMax);
    row.phi_pos = T(vespo_phi(log_weight, double(o.k_pos), double(o.lambda_pos)));
    row.phi_neg = T(vespo_phi(log_weight, double(o.k_neg), double(o.lambda_neg)));
  }
  return row;
}

// --- a token -----------------------------------------------------------------------------------------------------------------

template <typename T>
struct Term {
  T value, direct, through;
};

// The estimate of the KL to the reference policy, and its derivative where nothing is clamped.
template <typename T>
GK_HOST_DEVICE Term<T> kl_estimate(int estimator, const LossOptions<T>& o, T ref, T log_prob) {
  const T x = clamp(gap(ref, log_prob).value, -o.kl_log_ratio_clamp, o.kl_log_ratio_clamp);
  T value = T(0), slope = T(0);
  if (estimator == kK1) {
    value = -x;
    slope = T(1);
  } else if (estimator == kK2) {
    value = T(0.5) * x * x;
    slope = -x;
  } else if (estimator == kK3) {
    slope = -fast_expm1(x, value);
  } else if (estimator == kAbsolute) {
    value = magnitude(x);
    slope = x > T(0) ? T(-1) : (x < T(0) ? T(1) : -x);
  }
  return {value, slope, T(0)};
}

// The same with its clamp, its straight-through derivative and its importance weight. (Two functions, because GCC does not
// vectorise a loop over both.)
template <typename T>
GK_HOST_DEVICE Term<T> kl_term(const LossOptions<T>& o, const Term<T>& estimate, T ref, T log_prob, T ratio) {
  const Gap<T> g = gap(ref, log_prob);
  const bool outside = (g.value < -o.kl_log_ratio_clamp) | (g.value > o.kl_log_ratio_clamp) |
                       (estimate.value < -o.kl_value_clamp) | (estimate.value > o.kl_value_clamp);
  const T value = clamp(estimate.value, -o.kl_value_clamp, o.kl_value_clamp);
  T slope = outside ? T(0) : estimate.direct;
  slope = o.straight_through != T(0) ? (is_infinite(g.value) ? T(0) : -g.value) : slope;
  slope = g.slope == T(0) ? T(0) : slope;
  const T factor = o.importance_weighted != T(0) ? ratio : T(1);
  const T weighted = factor * value;
  return {weighted, factor * slope, o.importance_weighted != T(0) ? weighted : T(0)};
}

// policy + beta * kl; a coefficient of 0 takes the KL out, whatever it is.
template <typename T>
GK_HOST_DEVICE Term<T> token_term(const Term<T>& policy, const Term<T>& kl, T beta) {
  const bool without = beta == T(0);
  return {policy.value + (without ? T(0) : beta * kl.value), policy.direct + (without ? T(0) : beta * kl.direct),
          policy.through + (without ? T(0) : beta * kl.through)};
}

// d loss / d log_prob of a token; `slope` is that of its log-ratio, 0 or 1. At sequence level the row's part follows later:
// shared_gradient of what all its tokens send through their log-ratio.
template <typename T>
GK_HOST_DEVICE T token_gradient(const Term<T>& term, T upstream, bool token_level, T slope) {
  return upstream * (term.direct + (token_level & (slope != T(0)) ? term.through : T(0)));
}

template <typename T>
GK_HOST_DEVICE T shared_gradient(double through, double tokens) {
  return T(through / at_least_one(tokens));
}

}  // namespace loss_kernels
}  // namespace GK_ISA
}  // namespace grpo_kernels
