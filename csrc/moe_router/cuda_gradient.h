// The gradient of one token's logits, by one warp.
#pragma once

#include "moe_router/cuda_row.h"

namespace grpo_kernels {
namespace GK_ISA {
namespace router_kernels {
namespace {

// What lane k knows of slot k; zeros in the other lanes.
struct Slot {
  int expert;
  float gradient;  // of its logit, but for the dense part
  float dot;       // <g, w> over the slots
};

__device__ __forceinline__ Slot slot_gradient(const MoeRouterBackwardArgs& a, int64_t token, int expert, float weight) {
  const RouterOptions& o = a.options;
  const bool slot = lane_id() < a.rows.top_k;
  const auto* gradients = static_cast<const float*>(a.grad_weights);
  const float g = slot && gradients != nullptr ? gradients[token * a.rows.top_k + lane_id()] : 0.0f;
  float dot = sum_over_lanes(g * weight);
  // Weights that add up to the scaling do so up to rounding: the mean of g is worth a second look, as its use cancels.
  if (over_chosen(o)) dot += sum_over_lanes(weight * (g - dot / float(o.scaling)));
  Scored<float> score{0.0f, 0.0f};
  float sum = 0.0f;
  if (!is_softmax(o.scoring)) {
    if (slot) score = scored(o.scoring, load_logit(a.rows, token, expert));
    sum = sum_over_lanes(score.score);
  }
  return {expert, chosen_gradient(o, g, weight, dot, score.slope, sum), dot};
}

// out += slope (shift + v - <v, p>), v: the gradient of the balance losses by the token's p.
template <int P>
__device__ __forceinline__ void add_balance(const MoeRouterBackwardArgs& a, int64_t token, const float* grads,
                                            const float (&p)[P], const float (&slope)[P], float shift, float (&out)[P]) {
  const int experts = a.rows.experts, first = lane_id() * P;
  const auto* columns = static_cast<const float*>(a.balance);
  const float* aux = a.options.losses[router::kAuxLoss] ? columns : nullptr;
  const float* own = nullptr;
  if (a.options.losses[router::kSequenceLoss]) {
    const int64_t sequence = a.sequences.cu_seqlens == nullptr ? 0 : bounds_before(a.sequences, token) - 1;
    if (sequence >= 0 && sequence < a.sequences.count) own = columns + (aux == nullptr ? sequence : sequence + 1) * experts;
  }
  const float grad_aux = grads[router::kAuxLoss], grad_sequence = grads[router::kSequenceLoss];
  float v[P];
  float dot = 0.0f;
#pragma unroll
  for (int j = 0; j < P; ++j) {
    v[j] = first + j < experts ? balance_gradient(aux, grad_aux, own, grad_sequence, first + j) : 0.0f;
    dot += v[j] * p[j];
  }
  dot = sum_over_lanes(dot);
  float rest = 0.0f;  // what the mean misses because p adds up to 1 but for rounding: its use cancels
#pragma unroll
  for (int j = 0; j < P; ++j) rest += (v[j] - dot) * p[j];
  dot += sum_over_lanes(rest);
#pragma unroll
  for (int j = 0; j < P; ++j) out[j] = multiply_add(slope[j], v[j] - dot + shift, out[j]);
}

// What the losses, and a softmax over all experts, add to the gradient of every logit.
template <int P>
__device__ __forceinline__ void dense_gradient(const MoeRouterBackwardArgs& a, const Access& access, int64_t token, float dot,
                                               float (&out)[P]) {
  const RouterOptions& o = a.options;
  const auto* grads = static_cast<const float*>(a.grad_losses);
  const bool z_loss = grads != nullptr && o.losses[router::kZLoss];
  const bool balance = grads != nullptr && (o.losses[router::kAuxLoss] || o.losses[router::kSequenceLoss]);
  const bool plain = o.scoring == router::kSoftmax && !o.normalize;
#pragma unroll
  for (int j = 0; j < P; ++j) out[j] = 0.0f;
  if (!z_loss && !balance && !plain) return;
  float z[P];
  load_logits(a.rows, access.whole_rows, token, z);
  const bool soft = is_softmax(o.scoring);
  Terms<P> t{};
  float factor = plain ? -dot : 0.0f;  // of a softmax's p
  if (z_loss || soft) {
    softmax_terms(z, t);
    if (z_loss) factor += z_loss_factor(grads[router::kZLoss], log_sum_exp(t.max, t.sum), *a.live_tokens);
#pragma unroll
    for (int j = 0; j < P; ++j) {
      t.term[j] /= t.sum;  // as the weights were: what they add must cancel
      out[j] = soft && balance ? 0.0f : t.term[j] * factor;
    }
  }
  if (!balance) return;
  float slope[P];  // d p / d z, but for what all experts share
  if (soft) {
#pragma unroll
    for (int j = 0; j < P; ++j) slope[j] = t.term[j];
  } else {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < P; ++j) {
      const Scored<float> score = scored(o.scoring, z[j]);
      t.term[j] = score.score;
      slope[j] = score.slope;
      sum += score.score;
    }
    const float inverse = 1.0f / (sum_over_lanes(sum) + epsilon<float>());
#pragma unroll
    for (int j = 0; j < P; ++j) {
      t.term[j] *= inverse;
      slope[j] *= inverse;
    }
  }
  add_balance(a, token, grads, t.term, slope, soft ? factor : 0.0f, out);
}

// The lane's part of the warp's row.
template <int P>
__device__ __forceinline__ void put_part(float* row, const float (&values)[P]) {
  float* to = row + lane_id() * P;
  if constexpr (P % 4 == 0) {
#pragma unroll
    for (int j = 0; j < P; j += 4) {
      *reinterpret_cast<float4*>(to + j) = make_float4(values[j], values[j + 1], values[j + 2], values[j + 3]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < P; ++j) to[j] = values[j];
  }
}

// One float, or two numbers of 16 bits.
template <typename T>
__device__ __forceinline__ uint32_t pack(const float* from) {
  T low;
  from_arithmetic(from[0], low);
  if constexpr (sizeof(T) == 4) {
    return float_to_bits(low);
  } else {
    T high;
    from_arithmetic(from[1], high);
    return uint32_t(low.bits) | uint32_t(high.bits) << 16;
  }
}

// Fills the warp's row of shared memory with the gradient of a token's logits.
template <int P>
__device__ __forceinline__ void token_gradient(const MoeRouterBackwardArgs& a, const Access& access, int64_t token,
                                               float* row) {
  const int lane = lane_id(), top_k = a.rows.top_k;
  const bool slot = lane < top_k;
  const int expert = slot ? a.topk_ids[token * top_k + lane] : 0;
  const float weight = slot ? static_cast<const float*>(a.topk_weights)[token * top_k + lane] : 0.0f;
  const bool masked = __shfl_sync(kFullMask, expert, 0) < 0;
  const float first = __shfl_sync(kFullMask, weight, 0);
  float out[P];
  if (masked || first != first) {  // the row of a broken token is NaN
#pragma unroll
    for (int j = 0; j < P; ++j) out[j] = masked ? 0.0f : first;
    put_part(row, out);
    return;
  }
  const Slot own = slot_gradient(a, token, expert, weight);
  dense_gradient(a, access, token, own.dot, out);
  put_part(row, out);
  __syncwarp();
  if (slot) row[expert] += own.gradient;
}

// Writes the row from there.
template <typename T>
__device__ __forceinline__ void store_row(const float* row, int experts, bool whole, T* to) {
  constexpr int kVector = 16 / int(sizeof(T));
  if (!whole) {
    for (int e = lane_id(); e < experts; e += kWarp) from_arithmetic(row[e], to[e]);
    return;
  }
  for (int e = lane_id() * kVector; e < experts; e += kWarp * kVector) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = pack<T>(row + e + i * kVector / 4);
    *reinterpret_cast<uint4*>(to + e) = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

__device__ __forceinline__ void store_gradient(const MoeRouterBackwardArgs& a, bool whole, int64_t token, const float* row) {
  const int experts = a.rows.experts;
  const int64_t begin = token * experts;
  if (a.rows.dtype == kFloat32) {
    store_row(row, experts, whole, static_cast<float*>(a.grad_logits) + begin);
  } else if (a.rows.dtype == kBFloat16) {
    store_row(row, experts, whole, static_cast<bfloat16*>(a.grad_logits) + begin);
  } else {
    store_row(row, experts, whole, static_cast<float16*>(a.grad_logits) + begin);
  }
}

}  // namespace
}  // namespace router_kernels
}  // namespace GK_ISA
}  // namespace grpo_kernels
