// One token's logits on the CPU, in buffers of the first-level cache.
#pragma once

#include "common/cpu_dtype.h"
#include "moe_router/cpu_select.h"

namespace grpo_kernels {
namespace GK_ISA {
namespace router_kernels {

// The loops run over whole blocks, so that no element depends on where a vector ends: what follows the last expert is -inf, of
// which every score is 0.
template <typename A>
struct Row {
  alignas(64) A z[router::kMaxExperts];
  alignas(64) A score[router::kMaxExperts];  // e^(z - max) of a softmax
  alignas(64) A slope[router::kMaxExperts];
  int experts, end;
  A max, sum;
  bool broken;  // holds NaN or +inf
};

template <typename T, typename A>
inline void load_row(const RouterRows& rows, int64_t token, Row<A>& row) {
  const T* x = static_cast<const T*>(rows.logits) + token * rows.row_stride;
  row.experts = rows.experts;
  row.end = padded(rows.experts, kBlock);
  for (int i = rows.experts; i < row.end; ++i) row.z[i] = A(-__builtin_inff());
  int broken = 0;
  A max = A(-__builtin_inff());
#pragma omp simd reduction(max : max) reduction(| : broken)
  for (int i = 0; i < rows.experts; ++i) {
    const A value = to_arithmetic(x[i]);
    row.z[i] = value;
    max = value > max ? value : max;
    broken |= int(is_broken(value));
  }
  row.max = max;
  row.sum = 0;
  row.broken = broken != 0;
}

// Fills score and sum with those of a softmax over all experts.
template <typename A>
inline void softmax_terms(Row<A>& row) {
  const A max = row.max;
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < row.end; ++i) {
    const A term = softmax_term(row.z[i], max);
    row.score[i] = term;
    sum += term;
  }
  row.sum = sum;
}

// Fills score, sum and, if wanted, slope with those of sigmoid or sqrtsoftplus.
template <bool kSlope, int kScoring, typename A>
inline void score_terms(Row<A>& row) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < row.end; ++i) {
    const Scored<A> value = scored(kScoring, row.z[i]);
    row.score[i] = value.score;
    if (kSlope) row.slope[i] = value.slope;
    sum += value.score;
  }
  row.sum = sum;
}

template <bool kSlope, typename A>
inline void all_scores(int scoring, Row<A>& row) {
  if (is_softmax(scoring)) {
    softmax_terms(row);
  } else if (scoring == router::kSigmoid) {
    score_terms<kSlope, router::kSigmoid>(row);
  } else {
    score_terms<kSlope, router::kSqrtSoftplus>(row);
  }
}

// p = score times this: what the balance losses are about.
template <typename A>
inline A probability_factor(int scoring, A sum) {
  return A(1) / (is_softmax(scoring) ? sum : sum + epsilon<A>());
}

}  // namespace router_kernels
}  // namespace GK_ISA
}  // namespace grpo_kernels
