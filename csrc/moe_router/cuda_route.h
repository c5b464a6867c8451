// The route of one token, by one warp.
#pragma once

#include "moe_router/cuda_row.h"
#include "moe_router/pieces.h"

namespace grpo_kernels {
namespace GK_ISA {
namespace router_kernels {
namespace {

// What the launcher knows and the arguments do not say.
struct Plan {
  Pieces pieces;
  Access access;
  bool by_score;  // keys are scores, with bias or for groups; else logits
};

// Warps of a block that routes, and blocks that a multiprocessor shall hold at least.
template <int P>
constexpr int kRouteWarps = P <= 8 ? 16 : 8;
template <int P>
constexpr int kRouteBlocks = P <= 16 ? 2 : 1;

GK_HOST_DEVICE bool wants_balance(const RouterOptions& o) {
  return o.losses[router::kAuxLoss] || o.losses[router::kSequenceLoss];
}

// The block's dynamic shared memory. A warp's own rows have 32 P numbers: its sums of p so far, number j of lane l at 32 j + l,
// and room for groups of any size. They are there if they are needed.
struct Shared {
  int* counts;  // [E]: of the chunk
  int* chosen;  // [E]: of the piece
  float* sums;
  int* groups;
};

template <int P>
__device__ __forceinline__ Shared shared_memory(const MoeRouterArgs& a) {
  const int warp = threadIdx.x / kWarp, experts = a.rows.experts;
  int* counts = dynamic_shared<int>();
  int* rows = counts + 2 * experts;
  const int before = wants_balance(a.options) ? kRouteWarps<P> : 0;
  return {counts, counts + experts, reinterpret_cast<float*>(rows + warp * kWarp * P), rows + (before + warp) * kWarp * P};
}

// What a warp has seen of its chunk.
struct Tally {
  double z;
  int live, mismatches;
};

// --- one token ---------------------------------------------------------------------------------------------------------------

// The terms that the options need of a row, and the square of its log-sum-exp.
template <int P>
__device__ __forceinline__ double row_terms(const RouterOptions& o, bool by_score, const float (&z)[P], Terms<P>& t) {
  const bool z_loss = o.losses[router::kZLoss], balance = wants_balance(o);
  if (!is_softmax(o.scoring) && z_loss) softmax_terms(z, t);
  const bool all = o.scoring == router::kSoftmax && (by_score || !o.normalize);
  if (is_softmax(o.scoring) && (all || z_loss || balance)) softmax_terms(z, t);
  const double log_sum = z_loss ? double(log_sum_exp(t.max, t.sum)) : 0.0;
  if (!is_softmax(o.scoring) && (by_score || balance)) score_terms(o.scoring, z, t);
  return log_sum * log_sum;
}

template <int P>
__device__ __forceinline__ int live_experts(const MoeRouterArgs& a, const Plan& plan, const float (&z)[P], const Terms<P>& t,
                                            int* row) {
  const int experts = a.rows.experts;
  int ranks[P];
  if (!plan.by_score) {
    rank_keys(z, experts, ranks);
    return select_experts(ranks, a.rows.top_k);
  }
  float keys[P];
#pragma unroll
  for (int j = 0; j < P; ++j) {
    keys[j] = a.options.scoring == router::kTopkSoftmax ? z[j] : t.term[j];
    if (a.options.scoring == router::kSoftmax) keys[j] /= t.sum;
  }
  if (a.bias != nullptr) {
    float bias[P];
    load_part(static_cast<const float*>(a.bias), experts, plan.access.whole_bias, bias);
#pragma unroll
    for (int j = 0; j < P; ++j) keys[j] += bias[j];
  }
  rank_keys(keys, experts, ranks);
  if (a.n_group > 1) {
    if (plan.access.group_lanes > 0) {
      drop_groups_of_lanes(a, plan.access.group_lanes, ranks);
    } else {
      drop_any_groups(a, row, ranks);
    }
  }
  return select_experts(ranks, a.rows.top_k);
}

// The weight of lane k's expert, from its logit.
__device__ __forceinline__ float weigh(const MoeRouterArgs& a, int64_t token, int id, float max, float sum) {
  const RouterOptions& o = a.options;
  const bool slot = lane_id() < a.rows.top_k;
  const float z = slot ? load_logit(a.rows, token, id) : -__builtin_inff();
  float term;
  if (over_chosen(o)) max = max_over_lanes(z);
  if (is_softmax(o.scoring)) {
    term = softmax_term(z, max);
  } else {
    term = scored(o.scoring, z).score;
  }
  if (over_chosen(o) || !is_softmax(o.scoring)) sum = sum_over_lanes(slot ? term : 0.0f);
  return weight(o, term, sum);
}

template <int P>
__device__ __forceinline__ void route_token(const MoeRouterArgs& a, const Plan& plan, int token, const Shared& shared,
                                            Tally& tally) {
  const int lane = lane_id(), top_k = a.rows.top_k;
  const int64_t slot = int64_t(token) * top_k + lane;
  float* weights = static_cast<float*>(a.topk_weights);
  if (a.mask != nullptr && a.mask[token] == 0) {
    if (lane < top_k) {
      weights[slot] = 0.0f;
      a.topk_ids[slot] = -1;
    }
    return;
  }
  float z[P];
  load_logits(a.rows, plan.access.whole_rows, token, z);
  Replay replay{-1, false};
  if (a.replay != nullptr) replay = load_replay(a, token);
  bool broken = replay.faulty;
#pragma unroll
  for (int j = 0; j < P; ++j) broken |= is_broken(z[j]);
  broken = __any_sync(kFullMask, broken);
  const float poison = broken ? bits_to_float(0x7fc00000u) : 0.0f;

  Terms<P> t{};
  const double square = row_terms(a.options, plan.by_score, z, t);
  tally.live += 1;
  if (a.options.losses[router::kZLoss]) tally.z += square + double(poison);
  if (wants_balance(a.options)) {
    const float factor = 1.0f / (is_softmax(a.options.scoring) ? t.sum : t.sum + epsilon<float>());
#pragma unroll
    for (int j = 0; j < P; ++j) shared.sums[j * kWarp + lane] += t.term[j] * factor + poison;
  }
  int id = live_experts(a, plan, z, t, shared.groups);
  if (a.options.losses[router::kSequenceLoss]) {
    int chosen = id;
    if (plan.by_score) {
      int ranks[P];
      load_logits(a.rows, plan.access.whole_rows, token, z);
      rank_keys(z, a.rows.experts, ranks);
      chosen = select_experts(ranks, top_k);
    }
    if (lane < top_k) atomicAdd(shared.chosen + chosen, 1);
  }
  if (a.replay != nullptr) {
    bool differs;
    id = fill_replay(replay, id, top_k, differs);
    tally.mismatches += differs;
  }
  const float weight = weigh(a, token, id, t.max, t.sum) + poison;
  if (lane >= top_k) return;
  weights[slot] = weight;
  a.topk_ids[slot] = id;
  atomicAdd(shared.counts + id, 1);
}

}  // namespace
}  // namespace router_kernels
}  // namespace GK_ISA
}  // namespace grpo_kernels
