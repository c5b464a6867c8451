// The stages of the CPU kernel for a block of tokens: load, ratio, weights, policy term, KL, outputs. Each is a loop over
// arrays in the first-level cache, without branches inside, so that it vectorises. Masked tokens become zeros when they are
// loaded, and so do those that fill up a block's last lanes: the stages after loading, and the sums, take whole lanes.
#pragma once

#include <cstring>

#include "common/cpu_lanes.h"
#include "grpo_loss/cpu_scale.h"

namespace grpo_kernels {
namespace GK_ISA {
namespace loss_kernels {
constexpr int64_t kBlock = 256;
constexpr int64_t kLanes = 8;  // of a sum, whatever the instruction set: they decide its order

// Tokens of a block with those that fill it up, to twice the lanes.
inline int64_t padded(int64_t count) { return (count + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes); }

template <typename T>
struct Block {
  alignas(64) T log_prob[kBlock], old[kBlock], advantage[kBlock], weight[kBlock], ref[kBlock], sampler[kBlock];
  alignas(64) T entropy[kBlock], loss[kBlock], slope[kBlock];
  alignas(64) T upstream[kBlock], log_ratio[kBlock], ratio[kBlock], sampler_weight[kBlock], sampler_gap[kBlock], phi[kBlock];
  // of single surrogates
  alignas(64) T factor[kBlock], selected[kBlock], moved[kBlock], capped[kBlock];
  alignas(64) T policy[kBlock], direct[kBlock], through[kBlock], kl[kBlock], kl_direct[kBlock], kl_through[kBlock];
  // 0 or 1, in T so that all of a loop's vectors have equally many lanes
  alignas(64) T live[kBlock], scored[kBlock], kept[kBlock], dropped[kBlock];
};

template <typename T>
struct Problem {
  const GRPOLossArgs& a;
  LossOptions<T> o;
  T beta, entropy_coef, threshold;
  double scale;  // of all gradients

  bool given(int input) const { return a.tensors[input].data != nullptr; }
  bool masks_by_entropy() const { return a.numbers[kEntropyThreshold].data != nullptr; }
};

template <typename T>
Problem<T> make_problem(const GRPOLossArgs& a) {
  const LossScalar& threshold = a.numbers[kEntropyThreshold];
  const LossOptions<T> o = make_options<T>(a);
  return {a,
          o,
          read_number<T>(a.numbers[kKLCoef]),
          read_number<T>(a.numbers[kEntropyCoef]),
          threshold.data == nullptr ? -infinity<T>() : read_number<T>(threshold),
          gradient_scale(a, o)};
}

// What the gradients of a row with so many live tokens are multiplied by.
template <typename T>
T gradient_factor(const Problem<T>& p, double tokens) {
  return T(row_factor(p.o.reduction, tokens) * p.scale);
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
  for (int64_t i = count; i < padded(count); ++i) live[i] = T(0);
  return any != T(0);
}

// Returns whether any token of the block is live.
template <typename T>
bool load_live(const GRPOLossArgs& a, const Segment& s, int64_t begin, int64_t count, T* live) {
  if (s.row < 0) return false;
  const LossTensor& mask = a.tensors[kMask];
  if (mask.data == nullptr) {
    for (int64_t i = 0; i < count; ++i) live[i] = T(1);
    for (int64_t i = count; i < padded(count); ++i) live[i] = T(0);
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
    for (int64_t i = 0; i < padded(count); ++i) out[i] = live[i] != T(0) ? value : T(0);
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = live[i] != T(0) ? data[i] : T(0);
  for (int64_t i = count; i < padded(count); ++i) out[i] = T(0);
}

// Sum of term(i) over the live tokens of a block.
template <typename T, typename Term>
double sum_terms(const T* live, int64_t count, const Term& term) {
  alignas(64) double sums[kLanes] = {};
  for (int64_t i = 0; i < count; i += 2 * kLanes) {
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) {
      const int64_t j = i + l, k = j + kLanes;
      const T first = term(j), second = term(k);
      sums[l] += double(live[j] != T(0) ? first : T(0)) + double(live[k] != T(0) ? second : T(0));
    }
  }
  return sum_lanes(sums);
}

template <typename T>
void load_ratio_inputs(const Problem<T>& p, const Segment& s, int64_t begin, int64_t count, Block<T>& b) {
  load(p.a.tensors[kLogProbs], s, begin, count, b.live, b.log_prob);
  load(p.a.tensors[p.given(kOldLogProbs) ? kOldLogProbs : kLogProbs], s, begin, count, b.live, b.old);
  if (p.given(kSamplerLogProbs)) load(p.a.tensors[kSamplerLogProbs], s, begin, count, b.live, b.sampler);
}

// --- stages ------------------------------------------------------------------------------------------------------------------

template <typename T>
void bound_log_ratio(const LossOptions<T>& options, int64_t count, Block<T>& b) {
  const LossOptions<T> o = options;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const Gap<T> g = bounded<T>(o, {b.log_ratio[i], b.slope[i]});
    b.log_ratio[i] = g.value;
    b.slope[i] = g.slope;
  }
}

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
    if (o.shares_gradient) return;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) b.slope[i] = own_slope(b.log_prob[i]);
    return;
  }
  if (o.clamps_log_ratio) bound_log_ratio(o, count, b);
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

// b.weight: from the token's weight to the factor of the policy term; b.factor: that without the advantage.
template <bool kSeparate, typename T>
void weigh(const LossOptions<T>& options, T off_policy, int64_t count, Block<T>& b) {
  const LossOptions<T> o = options;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const T selected = kSeparate ? b.selected[i] : T(0);
    const PolicyWeight<T> w =
        policy_weight(o, off_policy, b.kept[i], selected, b.advantage[i], b.weight[i], b.sampler_weight[i]);
    b.weight[i] = w.weight;
    b.dropped[i] = w.dropped;
    if (kSeparate) b.factor[i] = w.factor;
  }
}

template <typename T>
void compute_weight(const Problem<T>& p, const RowState<T>& row, int64_t count, Block<T>& b) {
  const T threshold = p.threshold;
  const bool masked_by_entropy = p.masks_by_entropy();
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) b.kept[i] = !masked_by_entropy | (b.entropy[i] >= threshold) ? b.live[i] : T(0);
  if (p.o.surrogate == kDRO || p.given(kSelection)) {
    if (!p.given(kSelection)) memset(b.selected, 0, sizeof(b.selected));
    return weigh<true>(p.o, row.off_policy, count, b);
  }
  if (p.given(kTokenWeights) || p.o.off_policy_mask || masked_by_entropy || p.o.correction != kNoCorrection) {
    return weigh<false>(p.o, row.off_policy, count, b);
  }
  memcpy(b.weight, b.advantage, size_t(count) * sizeof(T));
}

template <int kKind, typename T>
void compute_policy(const LossOptions<T>& options, const RowState<T>& state, int64_t count, Block<T>& b) {
  const LossOptions<T> o = options;
  const RowState<T> row = state;
  constexpr bool kFactors = kKind == kDRO || kKind == kKLCov, kMoves = kKind == kDPPOTV || kKind == kDPPOKL;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const Term<T> t = policy_term<T>(kKind, o, row,
                                     {b.advantage[i], b.weight[i], kFactors ? b.factor[i] : T(1), b.log_prob[i], b.old[i],
                                      b.ratio[i], kMoves ? b.moved[i] : T(0), kKind == kKLCov ? b.selected[i] : T(0)});
    b.policy[i] = t.value;
    b.direct[i] = t.direct;
    b.through[i] = t.through;
    if (kKind == kVESPO) b.phi[i] = b.advantage[i] >= T(0) ? row.phi_pos : row.phi_neg;
  }
}

template <int kKind, typename T>
void compute_divergence(const LossOptions<T>& options, int64_t count, Block<T>& b) {
  const LossOptions<T> o = options;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    b.moved[i] = divergence(kKind, o, b.advantage[i], b.log_prob[i], b.old[i]);
    b.capped[i] = b.moved[i] == T(0) ? b.ratio[i] : T(0);
  }
}

template <typename T>
void compute_policy(const LossOptions<T>& o, const RowState<T>& row, int64_t count, Block<T>& b) {
  switch (o.surrogate) {
    case kPPOClip:
    case kClipCov:
      return compute_policy<kPPOClip>(o, row, count, b);
    case kCISPO:
      return compute_policy<kCISPO>(o, row, count, b);
    case kSAPO:
      return compute_policy<kSAPO>(o, row, count, b);
    case kVESPO:
      return compute_policy<kVESPO>(o, row, count, b);
    case kGMPO:
      return compute_policy<kGMPO>(o, row, count, b);
    case kDPPOTV:
      compute_divergence<kDPPOTV>(o, count, b);
      return compute_policy<kDPPOTV>(o, row, count, b);
    case kDPPOKL:
      compute_divergence<kDPPOKL>(o, count, b);
      return compute_policy<kDPPOKL>(o, row, count, b);
    case kDRO:
      return compute_policy<kDRO>(o, row, count, b);
    case kKLCov:
      return compute_policy<kKLCov>(o, row, count, b);
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
  const bool without_reduction = p.o.reduction == kNoReduction, reduces_entropy = p.o.reduces_entropy;
  const bool token_level = !p.o.shares_gradient;
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
      const T reduced = reduces_entropy ? b.upstream[i] : T(1);
      const T value = without_reduction ? (coef == T(0) ? T(0) : -coef * b.upstream[i]) : reduced;
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
