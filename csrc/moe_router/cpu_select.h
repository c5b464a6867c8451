// Selection of the best experts on the CPU.
//
// No sort: the K-th largest of some lane maxima is a bound that K experts or more reach, and few more do. They are collected
// and put in order by counting who is ahead of whom.
#pragma once

#include "moe_router/formula.h"

namespace grpo_kernels {
namespace GK_ISA {
namespace router_kernels {

constexpr int kBlock = 32;  // rows are padded to a multiple of it
constexpr int kLanes = 64;  // ranks to a multiple of this; also the most candidates that are ordered by counting

inline int padded(int count, int multiple) { return (count + multiple - 1) / multiple * multiple; }

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// ahead[i] = how many of values[0, count) are larger than values[i]. Both have room for a multiple of kBlock, and all of it is
// read and written.
template <typename R>
inline void count_larger(const R* values, int count, R* ahead) {
  typedef R Vector __attribute__((vector_size(kVectorBytes)));
  constexpr int kWidth = int(sizeof(Vector) / sizeof(R));
  constexpr int kVectors = kBlock / kWidth < 4 ? kBlock / kWidth : 4;  // as many as stay in registers
  for (int block = 0; block < count; block += kVectors * kWidth) {
    Vector own[kVectors], larger[kVectors] = {};
    memcpy(own, values + block, sizeof(own));
    for (int j = 0; j < count; ++j) {
      for (int v = 0; v < kVectors; ++v) larger[v] -= own[v] < values[j];  // true is -1
    }
    memcpy(ahead + block, larger, sizeof(larger));
  }
}

// A bound that at least `top_k` of the ranks reach. They are padded to a multiple of kLanes.
template <typename A>
inline typename Order<A>::Rank reached_by(const typename Order<A>::Rank* ranks, int experts, int top_k) {
  using R = typename Order<A>::Rank;
  const int lanes = top_k <= 16 || experts <= 32 ? 32 : kLanes;
  alignas(64) R largest[kLanes];
  for (int i = 0; i < lanes; ++i) largest[i] = ranks[i];
  for (int base = lanes; base < experts; base += lanes) {
#pragma omp simd
    for (int i = 0; i < lanes; ++i) largest[i] = ranks[base + i] > largest[i] ? ranks[base + i] : largest[i];
  }
  alignas(64) R ahead[kLanes];
  count_larger(largest, lanes, ahead);
  R bound = ~Order<A>::kLost;  // the highest rank
#pragma omp simd reduction(min : bound)
  for (int i = 0; i < lanes; ++i) {
    const R value = ahead[i] < R(top_k) ? largest[i] : ~Order<A>::kLost;
    bound = value < bound ? value : bound;
  }
  return bound;
}

// The experts whose ranks reach the bound, in ascending order. Returns how many.
template <typename R>
inline int collect(const R* ranks, int experts, R bound, int32_t* found) {
  int count = 0;
  for (int base = 0; base < experts; base += 64) {
    alignas(64) uint8_t reached[64];
    for (int i = 0; i < 64; ++i) reached[i] = ranks[base + i] >= bound;
    uint64_t bits = 0;
    for (int i = 0; i < 8; ++i) {  // eight bytes of 0 or 1 to eight bits
      uint64_t word;
      memcpy(&word, reached + 8 * i, sizeof(word));
      bits |= (word * 0x0102040810204080ull >> 56) << (8 * i);
    }
    if (experts - base < 64) bits &= (uint64_t(1) << (experts - base)) - 1;
    for (; bits != 0; bits &= bits - 1) found[count++] = base + __builtin_ctzll(bits);
  }
  return count;
}

// The `top_k` best of many candidates, by insertion: for rows of ties.
template <typename R>
inline void insert_best(const R* ranks, const int32_t* found, int count, int top_k, int32_t* ids) {
  int kept = 0;
  for (int c = 0; c < count; ++c) {
    const R rank = ranks[found[c]];
    if (kept == top_k && rank <= ranks[ids[kept - 1]]) continue;  // an equal with a lower id is ahead
    int place = kept < top_k ? kept++ : top_k - 1;
    for (; place > 0 && ranks[ids[place - 1]] < rank; --place) ids[place] = ids[place - 1];
    ids[place] = found[c];
  }
}

// The `top_k` best experts, in descending order of their ranks; the lower id wins a tie.
template <typename A>
inline void best_experts(typename Order<A>::Rank* ranks, int experts, int top_k, int32_t* ids) {
  using R = typename Order<A>::Rank;
  for (int i = experts; i % kLanes != 0; ++i) ranks[i] = Order<A>::kLost;
  int32_t found[router::kMaxExperts];
  const int count = collect(ranks, experts, reached_by<A>(ranks, experts, top_k), found);
  if (count > kLanes) {
    insert_best(ranks, found, count, top_k, ids);
    return;
  }
  alignas(64) R values[kLanes] = {};
  alignas(64) R ahead[kLanes];
  for (int i = 0; i < count; ++i) values[i] = ranks[found[i]];
  count_larger(values, count, ahead);
  int32_t ordered[kLanes];
  for (int i = 0; i < count; ++i) ordered[i] = -1;
  for (int i = 0; i < count; ++i) {
    int place = int(ahead[i]);
    while (ordered[place] >= 0) ++place;  // equals come in ascending order of their ids
    ordered[place] = found[i];
  }
  for (int k = 0; k < top_k; ++k) ids[k] = ordered[k];
}

// Marks the experts of all groups but the best; the lower group wins a tie.
template <typename A>
inline void drop_groups(const MoeRouterArgs& a, typename Order<A>::Rank* ranks) {
  using R = typename Order<A>::Rank;
  const int size = a.rows.experts / a.n_group;
  const int groups = a.n_group;
  R first[router::kMaxExperts], second[router::kMaxExperts], values[router::kMaxExperts];
  for (int g = 0; g < groups; ++g) first[g] = second[g] = Order<A>::kLost;
  for (int i = 0; i < size; ++i) {
#pragma omp simd
    for (int g = 0; g < groups; ++g) {
      const R rank = ranks[g * size + i];
      const R lower = rank < first[g] ? rank : first[g];
      second[g] = lower > second[g] ? lower : second[g];
      first[g] = rank > first[g] ? rank : first[g];
    }
  }
  for (int g = 0; g < groups; ++g) {
    values[g] = Order<A>::rank(group_value(Order<A>::key(first[g]), Order<A>::key(second[g]), a.group_score, size));
  }
  for (int g = 0; g < groups; ++g) {
    int ahead = 0;
    for (int other = 0; other < groups; ++other) {
      ahead += values[other] > values[g] || (values[other] == values[g] && other < g);
    }
    if (ahead < a.topk_group) continue;
    for (int i = 0; i < size; ++i) ranks[g * size + i] = Order<A>::kLost;
  }
}

}  // namespace router_kernels
}  // namespace GK_ISA
}  // namespace grpo_kernels
