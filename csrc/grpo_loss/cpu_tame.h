// Blocks of tame tokens: their log-probs and losses are finite, their ratios neither overflow nor vanish, and their loss is the
// plain one of policy term and k3. The formulas need no selections for infinities then, and one loop takes them all, with
// what it has found out at the end: a block that was not tame after all goes through the stages of cpu_block.h.
#pragma once

#include "grpo_loss/cpu_metrics.h"

namespace grpo_kernels {
namespace GK_ISA {
namespace loss_kernels {

// A float that meets neither infinities nor NaN. The formulas find what is simpler for it here. (No member functions but
// constructors: GCC keeps what they are called on in memory.)
namespace tame {

constexpr float kLargestLogRatio = 80.0f;

struct Tame {
  float value;

  Tame() = default;
  GK_HOST_DEVICE constexpr Tame(float x) : value(x) {}
  GK_HOST_DEVICE explicit constexpr Tame(double x) : value(float(x)) {}
  GK_HOST_DEVICE explicit constexpr Tame(int x) : value(float(x)) {}
};

GK_HOST_DEVICE Tame operator-(Tame a) { return -a.value; }
GK_HOST_DEVICE Tame operator+(Tame a, Tame b) { return a.value + b.value; }
GK_HOST_DEVICE Tame operator-(Tame a, Tame b) { return a.value - b.value; }
GK_HOST_DEVICE Tame operator*(Tame a, Tame b) { return a.value * b.value; }
GK_HOST_DEVICE Tame operator/(Tame a, Tame b) { return a.value / b.value; }
GK_HOST_DEVICE bool operator<(Tame a, Tame b) { return a.value < b.value; }
GK_HOST_DEVICE bool operator>(Tame a, Tame b) { return a.value > b.value; }
GK_HOST_DEVICE bool operator<=(Tame a, Tame b) { return a.value <= b.value; }
GK_HOST_DEVICE bool operator>=(Tame a, Tame b) { return a.value >= b.value; }
GK_HOST_DEVICE bool operator==(Tame a, Tame b) { return a.value == b.value; }
GK_HOST_DEVICE bool operator!=(Tame a, Tame b) { return a.value != b.value; }

GK_HOST_DEVICE Tame magnitude(Tame x) { return loss_kernels::magnitude(x.value); }
GK_HOST_DEVICE bool is_infinite(Tame) { return false; }
GK_HOST_DEVICE Gap<Tame> gap(Tame a, Tame b) { return {a - b, Tame(1)}; }
GK_HOST_DEVICE Tame times(Tame weight, Tame x) { return weight * x; }
GK_HOST_DEVICE Tame clamp(Tame x, Tame low, Tame high) { return loss_kernels::clamp(x.value, low.value, high.value); }

// Within kLargestLogRatio.
GK_HOST_DEVICE Tame fast_exp(Tame x) {
  uint32_t biased;
  const float p = exp_of_remainder<true>(x.value, biased);
  return p * bits_to_float(biased << 23);
}
GK_HOST_DEVICE Tame fast_expm1(Tame x, Tame& excess) { return GK_ISA::fast_expm1(x.value, excess.value); }

}  // namespace tame

using tame::Tame;

// Whether blocks may be tame under these options.
template <typename T>
bool may_be_tame(const Problem<T>& p) {
  const LossOptions<T>& o = p.o;
  const bool plain_ratio = !o.sequence_ratio && !o.clamps_log_ratio && o.delta == infinity<T>() && o.dual_clip == infinity<T>();
  const bool plain_kl =
      o.estimator == kNoKL || (o.estimator == kK3 && o.straight_through == T(0) && o.importance_weighted == T(0) &&
                               o.kl_log_ratio_clamp == infinity<T>() && o.kl_value_clamp == infinity<T>());
  const bool plain_policy = o.surrogate == kPPOClip || o.surrogate == kCISPO || o.surrogate == kReinforce;
  const bool plain_weight = !o.off_policy_mask && !p.given(kSamplerLogProbs) && !p.given(kTokenWeights);
  return plain_ratio && plain_kl && plain_policy && plain_weight && !p.given(kTokenEntropy) && !p.given(kSelection) &&
         !p.masks_by_entropy() && !p.given(kUpstream) && p.o.reduction != kNoReduction;
}

// The bounds that a tame loss does not have are constants: the compiler drops what they decide.
GK_HOST_DEVICE LossOptions<Tame> tame_options(float ratio_low, float ratio_high) {
  LossOptions<Tame> o{};
  o.ratio_low.value = ratio_low;
  o.ratio_high.value = ratio_high;
  o.delta.value = o.dual_clip.value = o.kl_log_ratio_clamp.value = o.kl_value_clamp.value = __builtin_huge_valf();
  return o;
}

struct TameInputs {
  const float *log_probs, *old, *advantages, *ref;
  int64_t count;
};

struct TameBlock {
  alignas(64) float live[kSegment], advantage[kSegment], unused[kSegment];
  alignas(64) float policy[kSegment], kl[kSegment], kl_direct[kSegment], log_ratio[kSegment], ratio[kSegment];
};

// The stages are several loops lest a processor's window holds but two or three steps of a long chain of operations.

// Log-ratios and ratios; masked tokens have 0 and 1. Returns the largest magnitude of a log-ratio.
inline float tame_ratios(const TameInputs& in, TameBlock& b) {
  const float *log_probs = in.log_probs, *olds = in.old;
  float largest = 0.0f;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < in.count; ++i) {
    const float log_ratio = b.live[i] != 0.0f ? log_probs[i] - olds[i] : 0.0f, size = magnitude(log_ratio);
    largest = size > largest ? size : largest;
    b.log_ratio[i] = log_ratio;
    b.ratio[i] = fast_exp(Tame(log_ratio)).value;
  }
  return largest;
}

GK_HOST_DEVICE Term<float> tame_kl(float ref, float log_prob) {
  const LossOptions<Tame> o = tame_options(0.0f, 0.0f);
  const Term<Tame> kl = kl_term<Tame>(o, kl_estimate<Tame>(kK3, o, ref, log_prob), ref, log_prob, Tame(1));
  return {kl.value.value, kl.direct.value, 0.0f};
}

inline void tame_kls(const TameInputs& in, TameBlock& b) {
  const float *log_probs = in.log_probs, *refs = in.ref;
#pragma omp simd
  for (int64_t i = 0; i < in.count; ++i) {
    const bool live = b.live[i] != 0.0f;
    const Term<float> kl = tame_kl(live ? refs[i] : 0.0f, live ? log_probs[i] : 0.0f);
    b.kl[i] = kl.value;
    b.kl_direct[i] = kl.direct;
  }
}

struct TameToken {
  float policy, grad, clip_low, clip_high, zero_advantage;
};

template <int kKind, bool kWithKL>
GK_HOST_DEVICE TameToken tame_token(float low, float high, float beta, float upstream, Tame log_prob, Tame advantage,
                                    Tame ratio, Tame kl_direct) {
  const LossOptions<Tame> o = tame_options(low, high);
  const RowState<Tame> row = plain_row<Tame>();
  const Term<Tame> policy =
      policy_term<Tame>(kKind, o, row, {advantage, advantage, Tame(1), log_prob, log_prob, ratio, Tame(0), Tame(0)});
  const Term<Tame> term = kWithKL ? token_term<Tame>(policy, {Tame(0), kl_direct, Tame(0)}, beta) : policy;
  const Tame grad = token_gradient<Tame>(term, upstream, true, Tame(1));
  const TokenFlags<Tame> flags = token_flags<Tame>(o, policy.value, advantage, ratio, ratio);
  return {policy.value.value, grad.value, flags.clip_low.value, flags.clip_high.value, flags.zero_advantage.value};
}

// What one loop counts.
struct TameCounts {
  float tokens, clip_low, clip_high, zero_advantage, ratio_min, ratio_max;
};

// Writes the gradients; leaves in `b` what is to be summed.
template <int kKind, bool kWithKL>
TameCounts tame_tokens(const Problem<float>& p, float upstream, const TameInputs& in, TameBlock& b, float* grad) {
  const float ratio_low = p.o.ratio_low, ratio_high = p.o.ratio_high, beta = p.beta;
  const float *log_probs = in.log_probs, *advantages = in.advantages;
  constexpr float kInfinity = __builtin_huge_valf();
  float tokens = 0.0f, low = 0.0f, high = 0.0f, zero = 0.0f, minimum = kInfinity, maximum = -kInfinity;
#pragma omp simd reduction(+ : tokens, low, high, zero) reduction(min : minimum) reduction(max : maximum)
  for (int64_t i = 0; i < in.count; ++i) {
    const bool live = b.live[i] != 0.0f;
    const float log_prob = live ? log_probs[i] : 0.0f, ratio = b.ratio[i];
    const TameToken t = tame_token<kKind, kWithKL>(ratio_low, ratio_high, beta, upstream, log_prob, advantages[i], ratio,
                                                   kWithKL ? b.kl_direct[i] : 0.0f);
    const float small = live ? ratio : kInfinity, large = live ? ratio : -kInfinity;
    grad[i] = live ? t.grad : 0.0f;
    b.policy[i] = live ? t.policy : 0.0f;
    b.ratio[i] = live ? ratio : 0.0f;
    minimum = small < minimum ? small : minimum;
    maximum = large > maximum ? large : maximum;
    tokens += b.live[i];
    low += live ? t.clip_low : 0.0f;
    high += live ? t.clip_high : 0.0f;
    zero += live ? t.zero_advantage : 0.0f;
  }
  return {tokens, low, high, zero, minimum, maximum};
}

struct TameSums {
  double policy, kl, log_ratio, ratio, ratio_squared;
};

template <bool kWithKL>
TameSums sum_tame(int64_t count, const TameBlock& b) {
  alignas(64) double policy[kLanes] = {}, kl[kLanes] = {}, log_ratio[kLanes] = {}, ratio[kLanes] = {}, squared[kLanes] = {};
  for (int64_t i = 0; i < count; i += 2 * kLanes) {
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) {
      const int64_t j = i + l, k = j + kLanes;
      const double first = double(b.ratio[j]), second = double(b.ratio[k]);
      policy[l] += double(b.policy[j]) + double(b.policy[k]);
      if (kWithKL) kl[l] += double(b.kl[j]) + double(b.kl[k]);
      log_ratio[l] += double(b.log_ratio[j]) + double(b.log_ratio[k]);
      ratio[l] += first + second;
      squared[l] += multiply_add(first, first, second * second);
    }
  }
  return {sum_lanes(policy), sum_lanes(kl), sum_lanes(log_ratio), sum_lanes(ratio), sum_lanes(squared)};
}

// Returns whether the tokens were tame; else the record is as it was.
template <int kKind, bool kWithKL>
bool tame_block(const Problem<float>& p, float upstream, const TameInputs& in, TameBlock& b, float* grad, double* record) {
  if (tame_ratios(in, b) > tame::kLargestLogRatio) return false;
  if (kWithKL) tame_kls(in, b);
  const TameCounts n = tame_tokens<kKind, kWithKL>(p, upstream, in, b, grad);
  const int64_t whole = padded(in.count);
  for (int64_t i = in.count; i < whole; ++i) b.policy[i] = b.kl[i] = b.log_ratio[i] = b.ratio[i] = 0.0f;
  const TameSums sums = sum_tame<kWithKL>(whole, b);
  const double kl = kWithKL ? double(p.beta) * sums.kl : 0.0, check = sums.policy + kl + sums.log_ratio;
  if (check - check != 0.0) return false;
  record[kTokens] += double(n.tokens);
  record[kHighEntropy] += double(n.tokens);
  record[kClipLow] += double(n.clip_low);
  record[kClipHigh] += double(n.clip_high);
  record[kZeroAdvantage] += double(n.zero_advantage);
  record[kTokenLoss] += sums.policy + kl;
  record[kPolicyLoss] += sums.policy;
  record[kKL] += sums.kl;
  record[kLogRatio] += sums.log_ratio;
  record[kRatio] += sums.ratio;
  record[kRatioSquared] += sums.ratio_squared;
  record[kRatioMin] = merge_slot(kRatioMin, record[kRatioMin], double(n.ratio_min));
  record[kRatioMax] = merge_slot(kRatioMax, record[kRatioMax], double(n.ratio_max));
  return true;
}

template <int kKind>
bool tame_block(const Problem<float>& p, float upstream, const TameInputs& in, TameBlock& b, float* grad, double* record) {
  return p.o.estimator == kNoKL ? tame_block<kKind, false>(p, upstream, in, b, grad, record)
                                : tame_block<kKind, true>(p, upstream, in, b, grad, record);
}

// A segment's tokens up to the last live one. Returns false where they have to go through the stages.
inline bool tame_segment(const Problem<float>& p, const Segment& s, float upstream, double* record) {
  TameBlock b;
  const int64_t offset = output_offset(p.a.layout, s);
  if (!load_live(p.a, s, s.begin, s.count, b.live)) {
    clear_outputs(p, offset, s.count);
    return true;
  }
  int64_t live = s.count;
  while (b.live[live - 1] == 0.0f) --live;
  const auto address = [&](int input) { return token_address<float>(p.a.tensors[input], s.row, s.begin); };
  TameInputs in{address(kLogProbs), address(p.given(kOldLogProbs) ? kOldLogProbs : kLogProbs), address(kAdvantages), nullptr,
                live};
  if (p.o.estimator != kNoKL) in.ref = address(kRefLogProbs);
  if (p.a.tensors[kAdvantages].token_stride == 0) {
    for (int64_t i = 0; i < live; ++i) b.advantage[i] = *in.advantages;
    in.advantages = b.advantage;
  }
  float* stored = p.a.grad_log_probs == nullptr ? nullptr : static_cast<float*>(p.a.grad_log_probs) + offset;
  float* grad = stored == nullptr ? b.unused : stored;
  if (stored != nullptr) memset(stored + live, 0, size_t(s.count - live) * sizeof(float));
  if (p.o.surrogate == kPPOClip) return tame_block<kPPOClip>(p, upstream, in, b, grad, record);
  if (p.o.surrogate == kCISPO) return tame_block<kCISPO>(p, upstream, in, b, grad, record);
  return tame_block<kReinforce>(p, upstream, in, b, grad, record);
}

// In double the library's exponential leaves nothing to gain.
inline bool tame_segment(const Problem<double>&, const Segment&, double, double*) { return false; }

}  // namespace loss_kernels
}  // namespace GK_ISA
}  // namespace grpo_kernels
