// What a warp does with one token: its logits in registers, the order of its experts, groups, replay.
//
// Lane l holds the experts [l P, (l + 1) P): the lower lane has the lower ids, so that the first lane of a vote wins a tie, and
// integers of 32 bits suffice to rank.
#pragma once

#include "common/cuda_launch.h"
#include "moe_router/formula.h"

namespace grpo_kernels {
namespace GK_ISA {
namespace router_kernels {
namespace {

using RankOf = Order<float>;
constexpr int kLost = RankOf::kLost;

// What the launcher has found out about the tensors.
struct Access {
  bool whole_rows, whole_bias;  // a lane's experts are aligned, and all inside or all outside
  int group_lanes;              // lanes that hold a group, a power of two; 0: groups do not fall into lanes so
};

__device__ __forceinline__ int lane_id() { return int(threadIdx.x) % kWarp; }

// Every lane ends with the same bits.
__device__ __forceinline__ float sum_over_lanes(float value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullMask, value, offset);
  return value;
}

__device__ __forceinline__ float max_over_lanes(float value) {
  return RankOf::key(__reduce_max_sync(kFullMask, RankOf::rank(value)));
}

// --- loading -----------------------------------------------------------------------------------------------------------------

template <typename T>
__device__ __forceinline__ float unpack(const uint32_t* words, int index) {
  if constexpr (sizeof(T) == 4) {
    return bits_to_float(words[index]);
  } else {
    return to_arithmetic(T{uint16_t(words[index / 2] >> (index % 2 * 16))});
  }
}

// P neighbours, aligned to 16 bytes or to all of them.
template <typename T, int P>
__device__ __forceinline__ void load_vector(const T* from, float (&to)[P]) {
  constexpr int kWords = P * int(sizeof(T)) / 4;
  if constexpr (kWords == 0) {
    to[0] = to_arithmetic(from[0]);
  } else {
    uint32_t words[kWords];
    if constexpr (kWords == 1) {
      words[0] = *reinterpret_cast<const uint32_t*>(from);
    } else if constexpr (kWords == 2) {
      const uint2 pair = *reinterpret_cast<const uint2*>(from);
      words[0] = pair.x, words[1] = pair.y;
    } else {
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        const uint4 four = reinterpret_cast<const uint4*>(from)[i / 4];
        words[i] = four.x, words[i + 1] = four.y, words[i + 2] = four.z, words[i + 3] = four.w;
      }
    }
#pragma unroll
    for (int j = 0; j < P; ++j) to[j] = unpack<T>(words, j);
  }
}

// The lane's part of a row; -inf where there is no expert.
template <typename T, int P>
__device__ __forceinline__ void load_part(const T* row, int experts, bool whole, float (&to)[P]) {
  const int first = lane_id() * P;
#pragma unroll
  for (int j = 0; j < P; ++j) to[j] = -__builtin_inff();
  if (whole) {
    if (first < experts) load_vector<T, P>(row + first, to);
    return;
  }
#pragma unroll
  for (int j = 0; j < P; ++j) {
    if (first + j < experts) to[j] = to_arithmetic(row[first + j]);
  }
}

template <int P>
__device__ __forceinline__ void load_logits(const RouterRows& rows, bool whole, int64_t token, float (&z)[P]) {
  const int64_t begin = token * rows.row_stride;
  if (rows.dtype == kFloat32) {
    load_part(static_cast<const float*>(rows.logits) + begin, rows.experts, whole, z);
  } else if (rows.dtype == kBFloat16) {
    load_part(static_cast<const bfloat16*>(rows.logits) + begin, rows.experts, whole, z);
  } else {
    load_part(static_cast<const float16*>(rows.logits) + begin, rows.experts, whole, z);
  }
}

__device__ __forceinline__ float load_logit(const RouterRows& rows, int64_t token, int expert) {
  const int64_t index = token * rows.row_stride + expert;
  if (rows.dtype == kFloat32) return static_cast<const float*>(rows.logits)[index];
  if (rows.dtype == kBFloat16) return to_arithmetic(static_cast<const bfloat16*>(rows.logits)[index]);
  return to_arithmetic(static_cast<const float16*>(rows.logits)[index]);
}

// --- scores ------------------------------------------------------------------------------------------------------------------

// The terms of a row and their sum: e^(z - max) of a softmax, else scores.
template <int P>
struct Terms {
  float term[P];
  float max, sum;
};

template <int P>
__device__ __forceinline__ void softmax_terms(const float (&z)[P], Terms<P>& t) {
  float max = z[0], sum = 0.0f;
#pragma unroll
  for (int j = 1; j < P; ++j) max = z[j] > max ? z[j] : max;
  t.max = max_over_lanes(max);
#pragma unroll
  for (int j = 0; j < P; ++j) {
    t.term[j] = softmax_term(z[j], t.max);
    sum += t.term[j];
  }
  t.sum = sum_over_lanes(sum);
}

template <int P>
__device__ __forceinline__ void score_terms(int scoring, const float (&z)[P], Terms<P>& t) {
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < P; ++j) {
    t.term[j] = scored(scoring, z[j]).score;
    sum += t.term[j];
  }
  t.sum = sum_over_lanes(sum);
}

// --- the order of the experts ------------------------------------------------------------------------------------------------

template <int P>
__device__ __forceinline__ void rank_keys(const float (&keys)[P], int experts, int (&ranks)[P]) {
  const int first = lane_id() * P;
#pragma unroll
  for (int j = 0; j < P; ++j) ranks[j] = first + j < experts ? RankOf::rank(keys[j]) : kLost;
}

// The best `top_k` experts: lane k ends with the k-th of them. Each turn finds the largest rank of the warp and the first lane
// that has it; that lane gives it up.
template <int P>
__device__ __forceinline__ int select_experts(int (&ranks)[P], int top_k) {
  const int lane = lane_id();
  int mine = -1;
#pragma unroll 1
  for (int k = 0; k < top_k; ++k) {
    int best = ranks[0];
#pragma unroll
    for (int j = 1; j < P; ++j) best = max(best, ranks[j]);
    const int top = __reduce_max_sync(kFullMask, best);
    const int winner = __ffs(int(__ballot_sync(kFullMask, best == top))) - 1;
    int place = 0;
    bool open = lane == winner;
#pragma unroll
    for (int j = 0; j < P; ++j) {
      if (open && ranks[j] == top) {
        ranks[j] = kLost;
        place = j;
        open = false;
      }
    }
    const int id = winner * P + __shfl_sync(kFullMask, place, winner);
    mine = lane == k ? id : mine;
  }
  return mine;
}

// --- groups ------------------------------------------------------------------------------------------------------------------

struct Best {
  int first = kLost, second = kLost;

  __device__ __forceinline__ void add(int rank) {
    second = max(second, min(first, rank));
    first = max(first, rank);
  }
  // The rank of a group with these two.
  __device__ __forceinline__ int value(const MoeRouterArgs& a) const {
    const int size = a.rows.experts / a.n_group;
    return RankOf::rank(group_value(RankOf::key(first), RankOf::key(second), a.group_score, size));
  }
};

// Groups that are whole lanes, a power of two of them: their lanes agree by shuffles.
template <int P>
__device__ __forceinline__ void drop_groups_of_lanes(const MoeRouterArgs& a, int lanes, int (&ranks)[P]) {
  Best best;
#pragma unroll
  for (int j = 0; j < P; ++j) best.add(ranks[j]);
  for (int offset = 1; offset < lanes; offset *= 2) {
    const int first = __shfl_xor_sync(kFullMask, best.first, offset), second = __shfl_xor_sync(kFullMask, best.second, offset);
    best.second = max(max(best.second, second), min(best.first, first));
    best.first = max(best.first, first);
  }
  const int value = best.value(a), group = lane_id() / lanes;
  int better = 0;
  for (int g = 0; g < a.n_group; ++g) {
    const int other = __shfl_sync(kFullMask, value, g * lanes);
    better += other > value || (other == value && g < group);
  }
#pragma unroll
  for (int j = 0; j < P; ++j) ranks[j] = better < a.topk_group ? ranks[j] : kLost;
}

// Groups of any size, by way of the warp's own E numbers of shared memory: 32 groups at a time.
template <int P>
__device__ __forceinline__ void drop_any_groups(const MoeRouterArgs& a, int* row, int (&ranks)[P]) {
  const int lane = lane_id(), first = lane * P, size = a.rows.experts / a.n_group;
  __syncwarp();  // an earlier use has been read
#pragma unroll
  for (int j = 0; j < P; ++j) {
    if (first + j < a.rows.experts) row[first + j] = ranks[j];
  }
  __syncwarp();
  // The value of group g takes the place of rank g, which lies in a group that has been read: 32 groups end before group 33.
  for (int base = 0; base < a.n_group; base += kWarp) {
    const int group = base + lane;
    Best best;
    for (int i = 0; i < size && group < a.n_group; ++i) best.add(row[group * size + i]);
    __syncwarp();
    if (group < a.n_group) row[group] = best.value(a);
    __syncwarp();
  }
  for (int base = 0; base < a.n_group; base += kWarp) {
    const int group = base + lane;
    int better = 0;
    for (int g = 0; g < a.n_group && group < a.n_group; ++g) {
      better += row[g] > row[group] || (row[g] == row[group] && g < group);
    }
    const unsigned kept = __ballot_sync(kFullMask, better < a.topk_group);
#pragma unroll
    for (int j = 0; j < P; ++j) {
      const int of = (first + j) / size - base;
      if (of >= 0 && of < kWarp && !(kept >> of & 1u)) ranks[j] = kLost;
    }
  }
}

// --- replay ------------------------------------------------------------------------------------------------------------------

// What a slot, lane k's, is asked to be.
struct Replay {
  int id;       // -1: to be filled
  bool faulty;  // neither an expert of its own nor -1
};

__device__ __forceinline__ Replay load_replay(const MoeRouterArgs& a, int64_t token) {
  const int lane = lane_id();
  const bool slot = lane < a.rows.top_k;
  const int64_t asked = slot ? replayed_id(a.replay, a.replay_type, token * a.rows.top_k + lane) : -1;
  const int id = slot && is_expert(asked, a.rows.experts) ? int(asked) : -1;
  const unsigned before = __match_any_sync(kFullMask, id) & ((1u << lane) - 1u);
  const bool repeated = id >= 0 && before != 0;
  return {repeated ? -1 : id, asked != -1 && (id < 0 || repeated)};
}

// The slots' experts: those that are asked for, and the best live ones of the others where nothing is. `differs`: the live
// experts are not the same.
__device__ __forceinline__ int fill_replay(const Replay& replay, int live, int top_k, bool& differs) {
  const int lane = lane_id();
  bool used = lane >= top_k;
  for (int k = 0; k < top_k; ++k) used |= __shfl_sync(kFullMask, replay.id, k) == live;
  unsigned free = __ballot_sync(kFullMask, !used);
  const unsigned missing = __ballot_sync(kFullMask, lane < top_k && replay.id < 0);
  differs = __popc(free) != __popc(missing);
  int id = replay.id;
  for (unsigned left = missing; left != 0; left &= left - 1) {
    const int best = __shfl_sync(kFullMask, live, __ffs(int(free)) - 1);
    if (lane == __ffs(int(left)) - 1) id = best;
    free &= free - 1;
  }
  return id;
}

// --- sequences ---------------------------------------------------------------------------------------------------------------

// How many of the bounds, count + 1, lie at or before a token: 32 of them are looked at at a time.
__device__ __forceinline__ int64_t bounds_before(const RouterSequences& s, int64_t token) {
  int64_t low = 0, high = s.count + 1;
  while (low < high) {
    const int64_t step = (high - low + kWarp - 1) / kWarp;
    const int64_t at = low + (lane_id() + 1) * step - 1;
    const unsigned before = __ballot_sync(kFullMask, at < high && sequence_end(s, at) <= token);
    low += __popc(before) * step;
    high = low + step - 1 < high ? low + step - 1 : high;
  }
  return low;
}

}  // namespace
}  // namespace router_kernels
}  // namespace GK_ISA
}  // namespace grpo_kernels
