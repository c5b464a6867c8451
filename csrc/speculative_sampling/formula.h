// The law of a verified draft, in the terms of one row.
//
//   noise       Philox4x32-10, key = seed, counter = (block, stream, place in the sequence). The uniform of a call's draft i,
//               24 bits, comes from block i at the place where the call begins; token j of the race from word j % 4 of block
//               j / 4 at the place of the token that is drawn. So no two calls of a sequence share noise.
//   race        argmax_j w_j / t_j, t_j exponential: token j wins with probability w_j / sum w.
//   token rule  u < p(x) / q(x), in logs: equal log-probs give a ratio of exactly 1.
//   block rule  P_i = min(P_{i-1} p / q, 1);  h_i = S_i / (S_i + 1 - P_i), S_i = sum max(P_i p - q, 0);  h_K = P_K
//   filters     thresholds on logits as ordered integers, so that equals stay or go together.
#pragma once

#include "common/math.h"
#include "speculative_sampling/speculative_sampling.h"

namespace grpo_kernels {
namespace GK_ISA {

enum NoiseStream : uint32_t { kAcceptanceStream = 0, kRaceStream = 1 };

// One round; the key is stepped by the caller.
GK_HOST_DEVICE void philox_round(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint32_t k0, uint32_t k1) {
  const uint64_t first = uint64_t(0xD2511F53u) * c0;
  const uint64_t second = uint64_t(0xCD9E8D57u) * c2;
  c0 = uint32_t(second >> 32) ^ c1 ^ k0;
  c2 = uint32_t(first >> 32) ^ c3 ^ k1;
  c1 = uint32_t(second);
  c3 = uint32_t(first);
}

// The four words of counter (c0, c1, c2, c3) take its place.
GK_HOST_DEVICE void philox(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint64_t seed) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    philox_round(c0, c1, c2, c3, k0, k1);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// In [0, 1): a word's upper 24 bits.
GK_HOST_DEVICE float uniform_of(uint32_t word) { return float(int32_t(word >> 8)) * 5.9604644775390625e-8f; }

// The uniform of draft i of a call that begins at place `offset` of the sequence.
GK_HOST_DEVICE float acceptance_uniform(uint64_t seed, uint64_t offset, int64_t i) {
  uint32_t c0 = uint32_t(i), c1 = kAcceptanceStream, c2 = uint32_t(offset), c3 = uint32_t(offset >> 32);
  philox(c0, c1, c2, c3, seed);
  return uniform_of(c0);
}

// The exponential of a token in the race, > 0. Never below uniform_of(word), nor below kLeastRaceTime.
GK_HOST_DEVICE double race_time(uint32_t word) {
  const double y = (double(word) + 0.5) * 2.3283064365386963e-10;
  return -::log1p(-(y < 1.0 - 5.9604644775390625e-8 ? y : 1.0 - 5.9604644775390625e-8));
}
constexpr double kLeastRaceTime = 1.1641532182693481e-10;  // 2^-33

// log p(x) - log q(x), -inf where one of them is 0.
GK_HOST_DEVICE double log_ratio(double log_p, double log_q) {
  const double lowest = -__builtin_inf();
  return log_p > lowest && log_q > lowest ? log_p - log_q : lowest;
}

GK_HOST_DEVICE bool accepts(float uniform, double log_ratio) { return double(uniform) < ::exp(log_ratio); }

// P of the block rule, in logs.
GK_HOST_DEVICE double next_log_weight(double log_weight, double log_ratio) {
  const double next = log_weight + log_ratio;
  return next < 0.0 ? next : 0.0;
}

// h before the last draft.
GK_HOST_DEVICE double block_threshold(double residual_mass, double weight) {
  const double rest = residual_mass + (1.0 - weight);
  return rest > 0.0 ? residual_mass / rest : 1.0;
}

// Integers in the order of the floats; both zeros are one. NaN has no place in it.
GK_HOST_DEVICE uint32_t ordered_key(float value) {
  const uint32_t bits = float_to_bits(value + 0.0f);
  return bits ^ (bits >> 31 != 0 ? 0xffffffffu : 0x80000000u);
}
GK_HOST_DEVICE uint64_t ordered_key(double value) {
  const double positive_zero = value + 0.0;
  uint64_t bits;
  memcpy(&bits, &positive_zero, sizeof(bits));
  return bits ^ (bits >> 63 != 0 ? ~uint64_t(0) : uint64_t(1) << 63);
}
GK_HOST_DEVICE float value_of(uint32_t key) { return bits_to_float(key ^ (key >> 31 != 0 ? 0x80000000u : 0xffffffffu)); }
GK_HOST_DEVICE double value_of(uint64_t key) {
  const uint64_t bits = key ^ (key >> 63 != 0 ? uint64_t(1) << 63 : ~uint64_t(0));
  double value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

}  // namespace GK_ISA
}  // namespace grpo_kernels
