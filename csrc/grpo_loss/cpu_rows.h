// Rows whose tokens all have the same loss: that of a sequence-level ratio and an advantage. Their statistics are their loss,
// and what is left to do is to spread one gradient over them.
#pragma once

#include "grpo_loss/cpu_block.h"

namespace grpo_kernels {
namespace GK_ISA {
namespace loss_kernels {

// Whether all tokens of a row have the same loss: that of the row's ratio and advantage.
template <typename T>
bool rows_are_uniform(const Problem<T>& p) {
  const bool plain_policy = p.o.surrogate == kPPOClip || p.o.surrogate == kSAPO;
  const bool plain_weight = p.a.tensors[kAdvantages].token_stride == 0 && !p.o.off_policy_mask && !p.given(kTokenWeights) &&
                            !p.given(kSamplerLogProbs) && !p.given(kSelection);
  const bool plain_outputs = p.o.reduction != kNoReduction && !p.given(kUpstream);
  return p.o.shares_gradient && plain_policy && plain_weight && plain_outputs && !p.given(kRefLogProbs) &&
         !p.given(kTokenEntropy) && !p.masks_by_entropy();
}

// The record of a row, with its first segment.
template <typename T>
void add_uniform_row(const LossOptions<T>& o, const double* sums, const RowState<T>& row, T advantage, T loss, double* record) {
  const double tokens = sums[kRowTokens], ratio = double(row.ratio);
  const TokenFlags<T> flags = token_flags(o, loss, advantage, row.ratio, row.ratio);
  record[kTokens] = record[kHighEntropy] = tokens;
  record[kPolicyLoss] = tokens * double(loss);
  record[kTokenLoss] = record[kPolicyLoss] * row_factor(o.reduction, tokens);
  record[kLogRatio] = sums[kRowLogRatio];
  record[kRatio] = tokens * ratio;
  record[kRatioSquared] = tokens * ratio * ratio;
  record[kNonfinite] = tokens * double(flags.nonfinite);
  record[kClipLow] = tokens * double(flags.clip_low);
  record[kClipHigh] = tokens * double(flags.clip_high);
  record[kCapped] = tokens * double(flags.capped);
  record[kZeroAdvantage] = tokens * double(flags.zero_advantage);
  record[kRatioMin] = merge_slot(kRatioMin, record[kRatioMin], ratio);
  record[kRatioMax] = merge_slot(kRatioMax, record[kRatioMax], ratio);
}

// The same gradient for every live token whose log-ratio has a slope.
template <typename T>
void store_uniform(const Problem<T>& p, const Segment& s, T value) {
  T* grad = static_cast<T*>(p.a.grad_log_probs) + output_offset(p.a.layout, s);
  alignas(64) T live[kBlock];
  for (int64_t done = 0; done < s.count; done += kBlock) {
    const int64_t count = s.count - done < kBlock ? s.count - done : kBlock;
    load_live(p.a, s, s.begin + done, count, live);
    const T* log_prob = token_address<T>(p.a.tensors[kLogProbs], s.row, s.begin + done);
    const T* old = p.given(kOldLogProbs) ? token_address<T>(p.a.tensors[kOldLogProbs], s.row, s.begin + done) : log_prob;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const T slope = gap(log_prob[i], old[i]).slope;
      grad[done + i] = (live[i] != T(0)) & (slope != T(0)) ? value : T(0);
    }
  }
}

template <typename T>
void uniform_segment(const Problem<T>& p, int64_t index) {
  const Segment s = segment_at(p.a.layout, index);
  double* record = segment_record(p.a, index);
  for (int slot = 0; slot < kRecord; ++slot) record[slot] = empty_slot(slot);
  const double* sums = s.row < 0 ? nullptr : segment_row_sums(p.a, s.first);
  if (sums == nullptr || sums[kRowTokens] == 0.0) return clear_outputs(p, output_offset(p.a.layout, s), s.count);
  const RowState<T> row = row_state(p.o, sums);
  const T advantage = *token_address<T>(p.a.tensors[kAdvantages], s.row, 0);
  const Term<T> term = policy_term<T>(p.o.surrogate, p.o, row, {advantage, advantage, T(1), T(0), T(0), row.ratio, T(0), T(0)});
  if (index == s.first) add_uniform_row(p.o, sums, row, advantage, term.value, record);
  if (p.a.grad_log_probs == nullptr) return;
  store_uniform(p, s, row.held != T(0) ? T(0) : gradient_factor(p, sums[kRowTokens]) * term.through);
}

}  // namespace loss_kernels
}  // namespace GK_ISA
}  // namespace grpo_kernels
