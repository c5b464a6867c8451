// The policy terms of the GRPO loss: a token's loss before the KL, for every surrogate. See formula.h for the conventions.
#pragma once

#include "grpo_loss/formula.h"

namespace grpo_kernels {
namespace GK_ISA {
namespace loss_kernels {

// --- weights -----------------------------------------------------------------------------------------------------------------

// The factors of the policy term that have no derivative.
template <typename T>
struct PolicyWeight {
  T weight;   // their product with the advantage
  T factor;   // and without
  T dropped;  // 1 if the off-policy mask does so, else 0
};

template <typename T>
GK_HOST_DEVICE PolicyWeight<T> policy_weight(const LossOptions<T>& o, T off_policy, T kept, T selected, T advantage, T weight,
                                             T correction) {
  const bool dropped = (off_policy != T(0)) & !(advantage >= T(0));
  const bool excluded = (kept == T(0)) | ((o.surrogate == kClipCov) & (selected != T(0)));
  weight = dropped | excluded ? T(0) : weight;
  weight = o.correction != kNoCorrection && o.surrogate != kVESPO ? times(weight, correction) : weight;
  return {times(advantage, weight), weight, dropped ? T(1) : T(0)};
}

// --- ratios that a bound holds -----------------------------------------------------------------------------------------------

// "gmpo": a token's part of its row's log-ratio. It is held at the bound that it has left in the advantage's direction, and 0
// without advantage.
template <typename T>
struct ClippedGap {
  T value;
  T slope;  // 0 or 1
};

template <typename T>
GK_HOST_DEVICE ClippedGap<T> clipped_gap(const LossOptions<T>& o, T advantage, T log_ratio) {
  const bool low = (advantage < T(0)) & (log_ratio < o.ratio_low), high = (advantage > T(0)) & (log_ratio > o.ratio_high);
  const bool idle = (advantage == T(0)) & (log_ratio == log_ratio);
  const T held = low ? o.ratio_low : (high ? o.ratio_high : T(0));
  const bool holds = low | high | idle;
  return {holds ? held : log_ratio, holds ? T(0) : T(1)};
}

GK_HOST_DEVICE float natural_log(float x) { return ::logf(x); }
GK_HOST_DEVICE double natural_log(double x) { return ::log(x); }

// "dppo_tv" and "dppo_kl": 0 where the token's probability has not moved too far in the advantage's direction, else an infinity
// with the sign of that direction.
template <typename T>
GK_HOST_DEVICE T divergence(int surrogate, const LossOptions<T>& o, T advantage, T log_prob, T old) {
  const T prob = fast_exp(log_prob), old_prob = fast_exp(old), moved = prob - old_prob;
  const bool positive = advantage > T(0);
  bool within = positive ? moved <= o.ratio_high : moved >= o.ratio_low;
  if (surrogate == kDPPOKL) {
    const T smallest = T(1e-8);
    const T other = prob > T(1) ? T(0) : T(1) - prob, old_other = old_prob > T(1) ? T(0) : T(1) - old_prob;
    const T kl =
        times(old_prob, gap(old, log_prob).value) + old_other * natural_log((old_other + smallest) / (other + smallest));
    within = positive ? (kl <= o.ratio_high) | (prob <= old_prob) : (kl <= -o.ratio_low) | (prob >= old_prob);
  }
  return within ? T(0) : (positive ? infinity<T>() : -infinity<T>());
}

// --- surrogates --------------------------------------------------------------------------------------------------------------

template <typename T>
GK_HOST_DEVICE Term<T> ppo_clip(const LossOptions<T>& o, T advantage, T weight, T ratio) {
  const bool capped = ratio > o.delta;
  const T unclipped = capped ? o.delta : ratio;
  const T bounded = clamp(ratio, o.ratio_low, o.ratio_high);
  const bool take_unclipped = unclipped * advantage <= bounded * advantage;
  const T taken = take_unclipped ? unclipped : bounded;
  const bool too_high = (advantage < T(0)) & (taken > o.dual_clip);
  const bool outside = (ratio < o.ratio_low) | (ratio > o.ratio_high);
  const bool held = too_high | (take_unclipped & capped) | (!take_unclipped & outside);
  return {-times(weight, too_high ? o.dual_clip : taken), T(0), held ? T(0) : -times(weight, ratio)};
}

// The soft gate 4 / tau * sigmoid(z), z = tau (r - 1). With e = exp(-|z|), its slope by log r is r times 4 e / (1 + e)^2, which
// is 1 - t^2, t = (1 - e) / (1 + e): the better form near r = 1.
template <typename T>
GK_HOST_DEVICE Term<T> sapo(const LossOptions<T>& o, T advantage, T weight, T ratio) {
  const T tau = advantage > T(0) ? o.tau_pos : o.tau_neg;
  const T z = tau * (ratio - T(1));
  const T e = fast_exp(-magnitude(z));
  const T sum = T(1) + e, t = (T(1) - e) / sum;
  const T gate = (z < T(0) ? e : T(1)) / sum;
  const T bell = t < T(0.5) ? T(1) - t * t : T(4) * e / (sum * sum);
  const T slope = is_infinite(ratio) ? T(0) : bell * ratio;
  return {-times(weight, T(4) * gate / tau), T(0), -times(weight, slope)};
}

// A policy gradient with a detached coefficient.
template <typename T>
GK_HOST_DEVICE Term<T> score_term(T coefficient, T log_prob) {
  return {-times(coefficient, log_prob), -coefficient, T(0)};
}

// "dppo_tv" and "dppo_kl": a policy gradient within the bounds of the divergence; NaN stays NaN.
template <typename T>
GK_HOST_DEVICE Term<T> dppo(const LossOptions<T>& o, T weight, T log_prob, T ratio, T moved) {
  const T capped = ratio > o.delta ? o.delta : ratio;
  return score_term(times(weight, (moved == T(0)) | (ratio != ratio) ? capped : T(0)), log_prob);
}

// A policy gradient with a squared penalty of the log-ratio.
template <typename T>
GK_HOST_DEVICE Term<T> dro(const LossOptions<T>& o, T weight, T factor, T log_prob, T log_ratio) {
  const T penalty = times(factor, T(0.5) * o.dro_beta * (log_ratio * log_ratio));
  return {penalty - times(weight, log_prob), times(factor, o.dro_beta * log_ratio) - weight, T(0)};
}

// The ratio without a clip, and the penalty of the tokens that were selected.
template <typename T>
GK_HOST_DEVICE Term<T> kl_cov(const LossOptions<T>& o, T weight, T factor, T ratio, T log_ratio, T selected) {
  const T sign = log_ratio > T(0) ? T(1) : (log_ratio < T(0) ? T(-1) : log_ratio);
  const bool penalised = selected != T(0);
  const T value = o.kl_cov_coef * times(factor, magnitude(log_ratio)), slope = o.kl_cov_coef * times(factor, sign);
  const T product = times(weight, ratio);
  return {penalised ? value - product : -product, penalised ? slope : T(0), -product};
}

// What the policy term of a token is made of; what its surrogate does not read may hold anything.
template <typename T>
struct PolicyToken {
  T advantage, weight, factor, log_prob, old, ratio, moved, selected;
};

template <typename T>
GK_HOST_DEVICE Term<T> common_policy_term(int surrogate, const LossOptions<T>& o, const RowState<T>& row,
                                          const PolicyToken<T>& t) {
  switch (surrogate) {
    case kPPOClip:
    case kClipCov:
      return ppo_clip(o, t.advantage, t.weight, t.ratio);
    case kSAPO:
      return sapo(o, t.advantage, t.weight, t.ratio);
    case kCISPO:
      return score_term(times(t.weight, clamp(t.ratio, o.ratio_low, o.ratio_high)), t.log_prob);
    case kVESPO:
      return score_term(times(t.weight, t.advantage >= T(0) ? row.phi_pos : row.phi_neg), t.log_prob);
    default:
      return score_term(t.weight, t.log_prob);
  }
}

// What takes more than weight, ratio and advantage.
template <typename T>
GK_HOST_DEVICE bool is_special(const LossOptions<T>& o) {
  return o.surrogate >= kGMPO || o.clamps_log_ratio || (o.sequence_ratio && !o.shares_gradient);
}

template <typename T>
GK_HOST_DEVICE Term<T> policy_term(int surrogate, const LossOptions<T>& o, const RowState<T>& row, const PolicyToken<T>& t) {
  switch (surrogate) {
    case kGMPO:
      return {-times(t.weight, t.ratio), T(0), -times(t.weight, t.ratio)};
    case kDPPOTV:
    case kDPPOKL:
      return dppo(o, t.weight, t.log_prob, t.ratio, t.moved);
    case kDRO:
      return dro(o, t.weight, t.factor, t.log_prob, gap(t.log_prob, t.old).value);
    case kKLCov:
      return kl_cov(o, t.weight, t.factor, t.ratio, gap(t.log_prob, t.old).value, t.selected);
    default:
      return common_policy_term(surrogate, o, row, t);
  }
}

}  // namespace loss_kernels
}  // namespace GK_ISA
}  // namespace grpo_kernels
