// The maths of one token's routing.
//
//   score = softmax(z), sigmoid(z) or sqrt(softplus(z));  key = score + bias, or the logit z itself without bias and groups
//   softmax of the chosen:    w_k = c e^z_k / sum over the chosen of e^z;   dz_k = w_k (g_k - <g, w> / c)
//   softmax, not normalised:  w_k = c p_k;                                  dz_j = 1[j = id_k] w_k g_k - p_j <g, w>
//   the others, normalised:   w_k = c s_k / (S + 1e-20), S over the chosen; dz_k = c (g_k - <g, w> / c) s'_k / (S + 1e-20)
//   not normalised:           w_k = c s_k;                                  dz_k = c g_k s'_k
//
//   z-loss: mean of L^2, L = logsumexp(z);      dz_j = 2 h L p_j / T
//   balance losses: sum over tokens of <v, p>;  dz_j = p_j (v_j - <v, p>) of a softmax, s'_j (v_j - <v, p>) / (sum s + 1e-20)
//   of the others, whose p = s / (sum s + 1e-20). v comes from counts alone.
//
// A is the arithmetic type: float, or double for float64 logits.
#pragma once

#include "common/math.h"
#include "moe_router/moe_router.h"

namespace grpo_kernels {
namespace GK_ISA {
namespace router_kernels {

// --- the order of keys
// --------------------------------------------------------------------------------------------------------

// Integers in the order of the keys: NaN below -inf, -0 equal to 0. The lowest integer is for experts of groups that lost.
template <typename A>
struct Order;
template <>
struct Order<float> {
  using Rank = int32_t;
  static constexpr Rank kLost = -2147483647 - 1;

  GK_HOST_DEVICE static Rank rank(float key) {
    const int32_t bits = int32_t(float_to_bits(key + 0.0f));
    const int32_t ordered = bits < 0 ? bits ^ 0x7fffffff : bits;
    return key != key ? kLost + 1 : ordered;
  }
  GK_HOST_DEVICE static float key(Rank rank) {
    return rank <= kLost + 1 ? bits_to_float(0x7fc00000u) : bits_to_float(uint32_t(rank < 0 ? rank ^ 0x7fffffff : rank));
  }
};
template <>
struct Order<double> {
  using Rank = int64_t;
  static constexpr Rank kLost = -9223372036854775807LL - 1;

  GK_HOST_DEVICE static Rank rank(double key) {
    const double canonical = key + 0.0;
    int64_t bits;
    memcpy(&bits, &canonical, sizeof(bits));
    const int64_t ordered = bits < 0 ? bits ^ 0x7fffffffffffffffLL : bits;
    return key != key ? kLost + 1 : ordered;
  }
  GK_HOST_DEVICE static double key(Rank rank) {
    const int64_t bits = rank < 0 ? rank ^ 0x7fffffffffffffffLL : rank;
    double value;
    memcpy(&value, &bits, sizeof(value));
    return rank <= kLost + 1 ? __builtin_nan("") : value;
  }
};

// One integer for a rank and an expert, larger = better: the lower id wins a tie. 0 is below them all.
GK_HOST_DEVICE uint64_t packed_rank(int32_t rank, int expert) {
  return uint64_t(uint32_t(rank) ^ 0x80000000u) << 32 | uint32_t(0x7fffffff - expert);
}
GK_HOST_DEVICE int packed_expert(uint64_t packed) { return 0x7fffffff - int(uint32_t(packed)); }
GK_HOST_DEVICE int32_t packed_order(uint64_t packed) { return int32_t(uint32_t(packed >> 32) ^ 0x80000000u); }

// What a group is worth, from its two best keys; a group of one has no second.
template <typename A>
GK_HOST_DEVICE A group_value(A first, A second, int group_score, int group_size) {
  return group_score == router::kTop2Sum && group_size > 1 ? first + second : first;
}

// Not a routable token: NaN, or +inf, of which nothing can be said but that its key is the largest.
template <typename A>
GK_HOST_DEVICE bool is_broken(A logit) {
  return !(logit < A(__builtin_inff()));
}

// --- scores
// -------------------------------------------------------------------------------------------------------------------

GK_HOST_DEVICE float square_root(float x) { return ::sqrtf(x); }
GK_HOST_DEVICE double square_root(double x) { return ::sqrt(x); }
GK_HOST_DEVICE float logarithm(float x) { return ::logf(x); }
GK_HOST_DEVICE double logarithm(double x) { return ::log(x); }

template <typename A>
GK_HOST_DEVICE A epsilon() {
  return A(1e-20);
}

template <typename A>
struct Scored {
  A score, slope;  // and its derivative by the logit
};

template <typename A>
GK_HOST_DEVICE Scored<A> sigmoid(A z) {
  const A t = fast_exp(z < A(0) ? z : -z);
  const A inverse = A(1) / (A(1) + t);
  return {z < A(0) ? t * inverse : inverse, t * inverse * inverse};
}

// log(1 + t) / t for 0 <= t <= 1, by the series of atanh in u = t / (2 + t) <= 1/3.
GK_HOST_DEVICE float log1p_quotient(float t) {
  const float inverse = 1.0f / (2.0f + t);
  const float u = t * inverse;
  const float square = u * u;
  float p = multiply_add(square, 1.0f / 13.0f, 1.0f / 11.0f);
  p = multiply_add(square, p, 1.0f / 9.0f);
  p = multiply_add(square, p, 1.0f / 7.0f);
  p = multiply_add(square, p, 1.0f / 5.0f);
  p = multiply_add(square, p, 1.0f / 3.0f);
  return (2.0f * inverse) * multiply_add(square, p, 1.0f);
}
GK_HOST_DEVICE double log1p_quotient(double t) { return t > 0.0 ? ::log1p(t) / t : 1.0; }

// With h = e^(-|z| / 2) and q = log(1 + h^2) / h^2: the score is h sqrt(q) below 0, where it neither cancels nor divides by 0,
// and sqrt(z + h^2 q) above.
template <typename A>
GK_HOST_DEVICE Scored<A> sqrt_softplus(A z) {
  const A h = fast_exp((z < A(0) ? z : -z) * A(0.5));
  const A t = h * h;
  const A q = log1p_quotient(t);
  const A positive = z < A(0) ? A(0) : z;
  const A root = square_root(z < A(0) ? q : multiply_add(t, q, positive));
  const A numerator = z < A(0) ? h : A(1);
  return {z < A(0) ? h * root : root, numerator / (A(2) * root * (A(1) + t))};
}

template <typename A>
GK_HOST_DEVICE Scored<A> scored(int scoring, A z) {
  return scoring == router::kSigmoid ? sigmoid(z) : sqrt_softplus(z);
}

GK_HOST_DEVICE bool is_softmax(int scoring) { return scoring == router::kSoftmax || scoring == router::kTopkSoftmax; }

// The weights are a softmax over the chosen logits alone: nothing underflows, and 0 / 0 cannot be.
GK_HOST_DEVICE bool over_chosen(const RouterOptions& o) {
  return o.scoring == router::kTopkSoftmax || (o.scoring == router::kSoftmax && o.normalize);
}

// A token's terms e^(z - max) of a softmax.
template <typename A>
GK_HOST_DEVICE A softmax_term(A z, A max) {
  return fast_exp(z - max);
}

// The weight of a chosen expert from its term (softmax: e^(z - max); else its score), and what the terms are divided by: a
// softmax's sum, over the chosen or over all; else the sum of the chosen scores.
template <typename A>
GK_HOST_DEVICE A weight(const RouterOptions& o, A term, A sum) {
  if (is_softmax(o.scoring)) return term / sum * A(o.scaling);
  return (o.normalize ? term / (sum + epsilon<A>()) : term) * A(o.scaling);
}

// The gradient of a chosen expert's logit through the weights, but for the dense part of a plain softmax.
//
//   g, w:    this slot's upstream gradient and weight;  dot = <g, w> over the slots
//   slope:   the derivative of its score, sum: the sum of the chosen scores; neither is read of a softmax
template <typename A>
GK_HOST_DEVICE A chosen_gradient(const RouterOptions& o, A g, A w, A dot, A slope, A sum) {
  const A scaling = A(o.scaling);
  if (over_chosen(o)) return w * (g - dot / scaling);
  if (o.scoring == router::kSoftmax) return w * g;
  return o.normalize ? scaling * (g - dot / scaling) * (slope / (sum + epsilon<A>())) : scaling * g * slope;
}

// --- losses
// -------------------------------------------------------------------------------------------------------------------

template <typename A>
GK_HOST_DEVICE A log_sum_exp(A max, A sum) {
  return max + logarithm(sum);
}

// d z-loss / d z_j = p_j times this.
template <typename A>
GK_HOST_DEVICE A z_loss_factor(A grad_loss, A log_sum, int64_t live_tokens) {
  return A(2) * grad_loss * log_sum / A(live_tokens);
}

GK_HOST_DEVICE double at_least_one(int64_t count) { return count < 1 ? 1.0 : double(count); }

// d auxiliary loss / d p of an expert.
GK_HOST_DEVICE double aux_column(int64_t count, int experts, int top_k, int64_t live_tokens) {
  const double tokens = at_least_one(live_tokens);
  return double(count) * double(experts) / (double(top_k) * tokens * tokens);
}

// d sequence-wise loss / d p of an expert for the tokens of a sequence; `sequences`: those that have live tokens.
GK_HOST_DEVICE double sequence_column(int64_t count, int experts, int top_k, int64_t live_tokens, int64_t sequences) {
  return aux_column(count, experts, top_k, live_tokens) / at_least_one(sequences);
}

// d loss / d p of an expert, of both balance losses. `aux` and `sequence` are the rows of MoeRouterArgs::balance, or null.
template <typename A>
GK_HOST_DEVICE A balance_gradient(const A* aux, A grad_aux, const A* sequence, A grad_sequence, int expert) {
  const A first = aux == nullptr ? A(0) : grad_aux * aux[expert];
  return sequence == nullptr ? first : multiply_add(grad_sequence, sequence[expert], first);
}

// --- replay and sequences
// -----------------------------------------------------------------------------------------------------

GK_HOST_DEVICE int64_t replayed_id(const void* replay, int type, int64_t index) {
  switch (type) {
    case router::kUint8:
      return static_cast<const uint8_t*>(replay)[index];
    case router::kInt8:
      return static_cast<const int8_t*>(replay)[index];
    case router::kInt16:
      return static_cast<const int16_t*>(replay)[index];
    case router::kInt32:
      return static_cast<const int32_t*>(replay)[index];
    default:
      return static_cast<const int64_t*>(replay)[index];
  }
}

GK_HOST_DEVICE bool is_expert(int64_t id, int experts) { return id >= 0 && id < experts; }

GK_HOST_DEVICE int64_t sequence_end(const RouterSequences& s, int64_t index) {
  return s.wide ? static_cast<const int64_t*>(s.cu_seqlens)[index] : static_cast<const int32_t*>(s.cu_seqlens)[index];
}

// The sequence of a token, or -1: how many of the ends are <= token. Wrong ends give a wrong sequence, never one that is not.
GK_HOST_DEVICE int64_t sequence_of(const RouterSequences& s, int64_t token) {
  if (s.cu_seqlens == nullptr) return 0;
  if (s.count == 0 || token < sequence_end(s, 0)) return -1;
  int64_t low = 0, high = s.count;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (sequence_end(s, middle + 1) <= token) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < s.count ? low : -1;
}

}  // namespace router_kernels
}  // namespace GK_ISA
}  // namespace grpo_kernels
