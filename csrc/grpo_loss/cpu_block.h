// The stages of the CPU kernel for a block of tokens: load, ratio, weights, policy term, KL, outputs, sums. Each is a loop over
// arrays in the first-level cache, without branches inside, so that it vectorises. Masked tokens become zeros when they are
// loaded.
#pragma once

#include <cstring>

#include "grpo_loss/records.h"

namespace grpo_kernels {
namespace GK_ISA {
namespace loss_kernels {
constexpr int64_t kBlock = 256;

template <typename T>
struct Block {
  alignas(64) T log_prob[kBlock], old[kBlock], advantage[kBlock], weight[kBlock], ref[kBlock], sampler[kBlock];
  alignas(64) T entropy[kBlock], loss[kBlock], slope[kBlock];
  alignas(64) T upstream[kBlock], log_ratio[kBlock], ratio[kBlock], sampler_weight[kBlock], sampler_gap[kBlock], phi[kBlock];
  alignas(64) T policy[kBlock], direct[kBlock], through[kBlock], kl[kBlock], kl_direct[kBlock], kl_through[kBlock];
  // 0 or 1, in T so that all of a loop's vectors have equally many lanes
  alignas(64) T live[kBlock], scored[kBlock], kept[kBlock], dropped[kBlock];
};

template <typename T>
struct Problem {
  const GRPOLossArgs& a;
  LossOptions<T> o;
  T beta, entropy_coef, threshold;

  bool given(int input) const { return a.tensors[input].data != nullptr; }
};

template <typename T>
Problem<T> make_problem(const GRPOLossArgs& a) {
  const LossScalar& threshold = a.numbers[kEntropyThreshold];
  return {a, make_options<T>(a), read_number<T>(a.numbers[kKLCoef]), read_number<T>(a.numbers[kEntropyCoef]),
          threshold.data == nullptr ? -infinity<T>() : read_number<T>(threshold)};
}

// --- loading -----------------------------------------------------------------------------------------------------------------

template <typename Integer, typename T>
bool load_mask(const LossTensor& tensor, const Segment& s, int64_t begin, int64_t count, T* live) {
  const Integer* mask = token_address<Integer>(tensor, s.row, begin);
  T any = T(0);
#pragma omp simd reduction(max : any)
  for (int64_t i = 0; i < count; ++i) {
    live[i] = mask[i] != 0 ? T(1) : T(0);
    any = live[i] > any ? live[i] : any;
  }
  return any != T(0);
}

// Returns whether any token of the block is live.
template <typename T>
bool load_live(const GRPOLossArgs& a, const Segment& s, int64_t begin, int64_t count, T* live) {
  if (s.row < 0) return false;
  const LossTensor& mask = a.tensors[kMask];
  if (mask.data == nullptr) {
    for (int64_t i = 0; i < count; ++i) live[i] = T(1);
    return true;
  }
  if (a.mask_bytes == 1) return load_mask<int8_t>(mask, s, begin, count, live);
  if (a.mask_bytes == 4) return load_mask<int32_t>(mask, s, begin, count, live);
  return load_mask<int64_t>(mask, s, begin, count, live);
}

template <typename T>
void load(const LossTensor& tensor, const Segment& s, int64_t begin, int64_t count, const T* live, T* out) {
  const T* data = token_address<T>(tensor, s.row, begin);
  if (tensor.token_stride == 0) {
    const T value = *data;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] = live[i] != T(0) ? value : T(0);
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = live[i] != T(0) ? data[i] : T(0);
}

template <typename T>
void load_ratio_inputs(const Problem<T>& p, const Segment& s, int64_t begin, int64_t count, Block<T>& b) {
  load(p.a.tensors[kLogProbs], s, begin, count, b.live, b.log_prob);
  load(p.a.tensors[p.given(kOldLogProbs) ? kOldLogProbs : kLogProbs], s, begin, count, b.live, b.old);
  if (p.given(kSamplerLogProbs)) load(p.a.tensors[kSamplerLogProbs], s, begin, count, b.live, b.sampler);
}

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
  T tokens = 0, nonfinite = 0, low = 0, high = 0, capped = 0, zero = 0;
#pragma omp simd reduction(+ : tokens, nonfinite, low, high, capped, zero)
  for (int64_t i = 0; i < count; ++i) {
    const TokenFlags<T> f = token_flags(o, b.loss[i], b.advantage[i], b.ratio[i]);
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

// --- stages ------------------------------------------------------------------------------------------------------------------

template <typename T>
void compute_ratio(const LossOptions<T>& o, const RowState<T>& row, int64_t count, Block<T>& b) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const Gap<T> g = gap(b.log_prob[i], b.old[i]);
    b.log_ratio[i] = g.value;
    b.slope[i] = g.slope;
  }
  if (o.sequence_ratio) {
    for (int64_t i = 0; i < count; ++i) b.ratio[i] = row.ratio;
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) b.ratio[i] = fast_exp(b.log_ratio[i]);
}

template <typename T>
void compute_sampler(const LossOptions<T>& options, const RowState<T>& row, int64_t count, Block<T>& b) {
  const LossOptions<T> o = options;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const SamplerGap<T> g = sampler_gap(b.old[i], b.sampler[i]);
    b.sampler_gap[i] = g.size;
    b.scored[i] = b.live[i] != T(0) ? g.scored : T(0);
  }
  if (o.corrects_sequences()) {
    for (int64_t i = 0; i < count; ++i) b.sampler_weight[i] = row.sampler_weight;
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) b.sampler_weight[i] = sampler_weight(o, fast_exp(evidence(b.old[i], b.sampler[i])));
}

// b.weight: from the token's weight to the factor of the policy term.
template <typename T>
void compute_weight(const Problem<T>& p, const RowState<T>& row, int64_t count, Block<T>& b) {
  const LossOptions<T> o = p.o;
  const T threshold = p.threshold, off_policy = row.off_policy;
  const bool masked_by_entropy = p.a.numbers[kEntropyThreshold].data != nullptr;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) b.kept[i] = !masked_by_entropy | (b.entropy[i] >= threshold) ? b.live[i] : T(0);
  if (!p.given(kTokenWeights) && !o.off_policy_mask && !masked_by_entropy && o.correction == kNoCorrection) {
    for (int64_t i = 0; i < count; ++i) b.weight[i] = b.advantage[i];
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const PolicyWeight<T> w = policy_weight(o, off_policy, b.kept[i], b.advantage[i], b.weight[i], b.sampler_weight[i]);
    b.weight[i] = w.weight;
    b.dropped[i] = w.dropped;
  }
}

template <int kKind, typename T>
void compute_policy(const LossOptions<T>& options, const RowState<T>& state, int64_t count, Block<T>& b) {
  const LossOptions<T> o = options;
  const RowState<T> row = state;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const Term<T> t = policy_term(kKind, o, row, b.advantage[i], b.weight[i], b.log_prob[i], b.ratio[i]);
    b.policy[i] = t.value;
    b.direct[i] = t.direct;
    b.through[i] = t.through;
    if (kKind == kVESPO) b.phi[i] = b.advantage[i] >= T(0) ? row.phi_pos : row.phi_neg;
  }
}

template <typename T>
void compute_policy(const LossOptions<T>& o, const RowState<T>& row, int64_t count, Block<T>& b) {
  switch (o.surrogate) {
    case kPPOClip:
      return compute_policy<kPPOClip>(o, row, count, b);
    case kCISPO:
      return compute_policy<kCISPO>(o, row, count, b);
    case kSAPO:
      return compute_policy<kSAPO>(o, row, count, b);
    case kVESPO:
      return compute_policy<kVESPO>(o, row, count, b);
    default:
      return compute_policy<kReinforce>(o, row, count, b);
  }
}

template <int kKind, typename T>
void estimate_kl(const LossOptions<T>& options, int64_t count, Block<T>& b) {
  const LossOptions<T> o = options;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const Term<T> t = kl_estimate(kKind, o, b.ref[i], b.log_prob[i]);
    b.kl[i] = t.value;
    b.kl_direct[i] = t.direct;
  }
}

template <typename T>
void compute_kl(const LossOptions<T>& options, int64_t count, Block<T>& b) {
  const LossOptions<T> o = options;
  if (o.estimator == kK1) estimate_kl<kK1>(o, count, b);
  if (o.estimator == kK2) estimate_kl<kK2>(o, count, b);
  if (o.estimator == kK3) estimate_kl<kK3>(o, count, b);
  if (o.estimator == kAbsolute) estimate_kl<kAbsolute>(o, count, b);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const Term<T> t = kl_term<T>(o, {b.kl[i], b.kl_direct[i], T(0)}, b.ref[i], b.log_prob[i], b.ratio[i]);
    b.kl[i] = t.value;
    b.kl_direct[i] = t.direct;
    b.kl_through[i] = t.through;
  }
}

// b.loss, and b.direct and b.through of policy term and KL together.
template <typename T>
void combine(const Problem<T>& p, int64_t count, Block<T>& b) {
  if (!p.given(kRefLogProbs)) {
    for (int64_t i = 0; i < count; ++i) b.loss[i] = b.policy[i];
    return;
  }
  const T beta = p.beta;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const Term<T> t = token_term<T>({b.policy[i], b.direct[i], b.through[i]}, {b.kl[i], b.kl_direct[i], b.kl_through[i]}, beta);
    b.loss[i] = t.value;
    b.direct[i] = t.direct;
    b.through[i] = t.through;
  }
}

template <typename T>
void store_outputs(const Problem<T>& p, int64_t offset, int64_t count, const Block<T>& b) {
  const bool without_reduction = p.o.reduction == kNoReduction, token_level = !p.o.sequence_ratio;
  const T coef = p.given(kTokenEntropy) ? p.entropy_coef : T(0);
  if (p.a.grad_log_probs != nullptr) {
    T* grad = static_cast<T*>(p.a.grad_log_probs) + offset;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const T value = token_gradient<T>({T(0), b.direct[i], b.through[i]}, b.upstream[i], token_level, b.slope[i]);
      grad[i] = b.live[i] != T(0) ? value : T(0);
    }
  }
  if (p.a.grad_entropy != nullptr) {
    T* grad = static_cast<T*>(p.a.grad_entropy) + offset;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const T value = without_reduction ? (coef == T(0) ? T(0) : -coef * b.upstream[i]) : T(1);
      grad[i] = b.kept[i] != T(0) ? value : T(0);
    }
  }
  if (p.a.loss != nullptr && without_reduction) {
    T* loss = static_cast<T*>(p.a.loss) + offset;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const T bonus = (coef != T(0)) & (b.kept[i] != T(0)) ? coef * b.entropy[i] : T(0);
      loss[i] = b.live[i] != T(0) ? b.loss[i] - bonus : T(0);
    }
  }
}

template <typename T>
void clear_outputs(const Problem<T>& p, int64_t offset, int64_t count) {
  const auto clear = [&](void* output) {
    if (output != nullptr) memset(static_cast<T*>(output) + offset, 0, size_t(count) * sizeof(T));
  };
  clear(p.a.grad_log_probs);
  clear(p.a.grad_entropy);
  if (p.o.reduction == kNoReduction) clear(p.a.loss);
}

}  // namespace loss_kernels
}  // namespace GK_ISA
}  // namespace grpo_kernels
