// A token's route on the CPU: the order of its experts, replay, and the weights of the chosen.
#pragma once

#include "moe_router/cpu_row.h"

namespace grpo_kernels {
namespace GK_ISA {
namespace router_kernels {

// A set of experts.
struct Members {
  uint64_t words[router::kMaxExperts / 64] = {};

  bool has(int64_t id) const { return words[id / 64] >> (id % 64) & 1; }
  void add(int64_t id) { words[id / 64] |= uint64_t(1) << (id % 64); }
};

// Turns live ids into replayed ones. Returns false where the replay is faulty.
inline bool replay_row(const MoeRouterArgs& a, int64_t token, int32_t* ids, bool& differs) {
  const int top_k = a.rows.top_k;
  Members live, taken;
  for (int k = 0; k < top_k; ++k) live.add(ids[k]);
  int32_t result[router::kMaxTopK];
  for (int k = 0; k < top_k; ++k) {
    const int64_t id = replayed_id(a.replay, a.replay_type, token * top_k + k);
    result[k] = -1;
    if (id == -1) continue;
    if (!is_expert(id, a.rows.experts) || taken.has(id)) return false;
    taken.add(id);
    result[k] = int32_t(id);
    differs = differs || !live.has(id);
  }
  int next = 0;
  for (int k = 0; k < top_k; ++k) {
    if (result[k] >= 0) continue;
    while (taken.has(ids[next])) ++next;
    result[k] = ids[next++];
  }
  memcpy(ids, result, size_t(top_k) * sizeof(int32_t));
  return true;
}

template <typename A>
inline void rank_row(const MoeRouterArgs& a, const Row<A>& row, bool by_logit, typename Order<A>::Rank* ranks) {
  const A* bias = by_logit ? nullptr : static_cast<const A*>(a.bias);
  if (by_logit || a.options.scoring == router::kTopkSoftmax) {
    for (int i = 0; i < row.experts; ++i) ranks[i] = Order<A>::rank(bias == nullptr ? row.z[i] : row.z[i] + bias[i]);
    return;
  }
  const bool softmax = a.options.scoring == router::kSoftmax;
  for (int i = 0; i < row.experts; ++i) {
    const A score = softmax ? row.score[i] / row.sum : row.score[i];
    ranks[i] = Order<A>::rank(bias == nullptr ? score : score + bias[i]);
  }
}

// The terms of the chosen experts' weights: of a softmax over them, or their scores.
template <typename A>
inline void chosen_terms(int scoring, int count, const A* z, A max, A* terms) {
  if (is_softmax(scoring)) {
#pragma omp simd
    for (int k = 0; k < count; ++k) terms[k] = softmax_term(z[k], max);
  } else if (scoring == router::kSigmoid) {
#pragma omp simd
    for (int k = 0; k < count; ++k) terms[k] = sigmoid(z[k]).score;
  } else {
#pragma omp simd
    for (int k = 0; k < count; ++k) terms[k] = sqrt_softplus(z[k]).score;
  }
}

// Scores of the chosen experts, and their derivatives by the logits; not of a softmax.
template <typename A>
inline void chosen_scores(int scoring, int count, const A* z, A* score, A* slope) {
  const auto run = [&](auto value_of) {
#pragma omp simd
    for (int k = 0; k < count; ++k) {
      const Scored<A> value = value_of(z[k]);
      score[k] = value.score;
      slope[k] = value.slope;
    }
  };
  if (scoring == router::kSigmoid) {
    run([](A logit) { return sigmoid(logit); });
  } else {
    run([](A logit) { return sqrt_softplus(logit); });
  }
}

// The weights of the chosen; NaN in a broken row. Returns whether the row is broken.
template <typename A>
inline bool weigh_row(const RouterOptions& o, const Row<A>& row, const int32_t* ids, int top_k, A* weights) {
  alignas(64) A z[router::kMaxTopK], terms[router::kMaxTopK];
  const bool all = o.scoring == router::kSoftmax && !o.normalize;
  const int count = padded(top_k, 8);
  A max = A(-__builtin_inff());
  for (int k = 0; k < top_k; ++k) {
    z[k] = row.z[ids[k]];
    max = z[k] > max ? z[k] : max;
  }
  for (int k = top_k; k < count; ++k) z[k] = max;
  max = all ? row.max : max;
  chosen_terms(o.scoring, count, z, max, terms);  // over all experts the same terms as row.score
  // One after another: float would round at each of up to 32.
  double chosen = 0.0;
  for (int k = 0; k < top_k; ++k) chosen += double(terms[k]);
  const A sum = all ? row.sum : A(chosen);
  const bool broken = row.broken || (is_softmax(o.scoring) && max == A(-__builtin_inff()));
  const A poison = broken ? A(__builtin_nanf("")) : A(1);
  for (int k = 0; k < top_k; ++k) weights[k] = weight(o, terms[k], sum) * poison;
  return broken;
}

}  // namespace router_kernels
}  // namespace GK_ISA
}  // namespace grpo_kernels
