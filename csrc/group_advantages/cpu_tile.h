// Statistics of groups on the CPU, and equal groups of plain rewards, many at a time.
#pragma once

#include <cstring>

#include "common/cpu_dtype.h"
#include "group_advantages/formula.h"

namespace grpo_kernels {
namespace GK_ISA {

// Four interleaved partial sums, so that one addition need not wait for another: groups are too short for more.
typedef double Four __attribute__((vector_size(4 * sizeof(double))));

GK_HOST_DEVICE double total(const Four& sums) { return (sums[0] + sums[1]) + (sums[2] + sums[3]); }

// The number of values that are not NaN, and the sum of their differences to the first of them.
struct Shifted {
  double live, pivot, sum;
};

GK_HOST_DEVICE Shifted shifted_sum(const double* values, int64_t count) {
  int64_t first = 0;
  while (first < count && is_nan(values[first])) ++first;
  const double pivot = first < count ? values[first] : 0.0;
  const Four zero = {}, one = zero + 1.0;
  Four live = {}, sums = {};
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    Four v;
    memcpy(&v, values + i, sizeof(v));
    live += v == v ? one : zero;
    sums += v == v ? v - pivot : zero;
  }
  for (; i < count; ++i) {
    live[0] += is_nan(values[i]) ? 0.0 : 1.0;
    sums[0] += is_nan(values[i]) ? 0.0 : values[i] - pivot;
  }
  return {total(live), pivot, total(sums)};
}

// The sum of the squared differences to the mean, NaN left out.
GK_HOST_DEVICE double squared_sum(const double* values, int64_t count, double mean) {
  const Four zero = {};
  Four sums = {};
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    Four v;
    memcpy(&v, values + i, sizeof(v));
    const Four difference = v == v ? v - mean : zero;
    sums += difference * difference;
  }
  for (; i < count; ++i) {
    const double difference = is_nan(values[i]) ? 0.0 : values[i] - mean;
    sums[0] += difference * difference;
  }
  return total(sums);
}

// Statistics of `count` values, NaN left out, in an order that depends on the count alone.
inline Statistics statistics(const double* values, int64_t count, int correction) {
  const Shifted shifted = shifted_sum(values, count);
  const double mean = mean_from_sum(shifted.pivot, shifted.sum, shifted.live);
  return {mean, std_from_sum(squared_sum(values, count, mean), shifted.live, correction), shifted.live};
}

template <typename T>
void convert(const GroupAdvantagesArgs& a, int64_t begin, int64_t end, double* values) {
  const T* rewards = static_cast<const T*>(a.rewards);
  for (int64_t p = begin; p < end; ++p) values[p - begin] = double(to_arithmetic(rewards[sample_at(a.grouping, p)]));
}

// Total rewards of a group, in float64, by position. The usual case, one function without a weight, is a mere conversion.
inline void total_rewards(const GroupAdvantagesArgs& a, int64_t begin, int64_t end, double* values) {
  if (a.functions > 1 || a.weights != nullptr) {
    for (int64_t p = begin; p < end; ++p) values[p - begin] = combined_reward(a, sample_at(a.grouping, p));
    return;
  }
  return by_dtype(a.dtype, [&](auto element) { return convert<decltype(element)>(a, begin, end, values); });
}

constexpr int64_t kTileGroups = 64, kTileSamples = 2048;

// Whether groups can be taken by the tile: neighbours, one reward each, and nothing that takes another pass.
inline bool is_plain(const GroupAdvantagesArgs& a) {
  return a.grouping.order == nullptr && a.functions == 1 && a.weights == nullptr && !needs_batch(a) &&
         a.baseline != kBaselineLengthWeighted && a.baseline != kBaselineSecondBest;
}

// What the groups of a tile are centred by; mean and std are results as well.
struct Tile {
  alignas(64) double live[kTileGroups], pivot[kTileGroups], sum[kTileGroups], mean[kTileGroups], std[kTileGroups];
  alignas(64) double shift[kTileGroups], factor[kTileGroups], inverse[kTileGroups];
};

// From mean and sum of squares. The usual options are constants to the compiler, which then takes groups in vectors.
template <bool kUsual>
void centre_tile(const GroupAdvantagesArgs& args, int64_t groups, Tile& t) {
  GroupAdvantagesArgs a = args;
  if (kUsual) {
    a.baseline = kBaselineMean;
    a.normalize_by = kNormalizeGroup;
    a.aggregation = kSumThenNormalize;
    a.singleton = kSingletonZero;
  }
  for (int64_t g = 0; g < groups; ++g) {
    Statistics s{t.mean[g], std_from_sum(t.sum[g], t.live[g], a.correction), t.live[g]};
    apply_singleton(a, s);
    const Centring c = make_centring(a, s, {0.0, 0.0});
    t.mean[g] = s.mean;
    t.std[g] = s.std;
    t.shift[g] = c.shift;
    t.factor[g] = c.factor;
    t.inverse[g] = c.inverse;
  }
}

template <int kCount, typename Out>
inline void store_values(const Centring& c, const double* values, Out* advantages) {
#pragma omp simd
  for (int i = 0; i < kCount; ++i) {
    const double result = scaled(centred(c, values[i]), c.inverse);
    advantages[i] = Out(is_nan(values[i]) ? 0.0 : result);
  }
}

template <int kCount, typename Out>
inline void store_both(Out mean, Out std, Out* means, Out* stds) {
  for (int i = 0; i < kCount; ++i) means[i] = mean;
  for (int i = 0; i < kCount; ++i) stds[i] = std;
}

// Groups [first, first + groups), kTileGroups at most, with room for their values. A group's mean waits for its sum, and its
// deviation for its mean: a tile's groups wait together, and divide and take roots in vectors. Bit for bit what `statistics`
// gives.
template <typename Out>
void advantages_of_tile(const GroupAdvantagesArgs& a, int64_t first, int64_t groups, double* values) {
  const int64_t size = a.grouping.group_size, begin = first * size;
  Tile t;
  total_rewards(a, begin, begin + groups * size, values);
  for (int64_t g = 0; g < groups; ++g) {
    const Shifted shifted = shifted_sum(values + g * size, size);
    t.live[g] = shifted.live;
    t.pivot[g] = shifted.pivot;
    t.sum[g] = shifted.sum;
  }
  for (int64_t g = 0; g < groups; ++g) t.mean[g] = mean_from_sum(t.pivot[g], t.sum[g], t.live[g]);
  for (int64_t g = 0; g < groups; ++g) t.sum[g] = squared_sum(values + g * size, size, t.mean[g]);
  const bool usual = a.baseline == kBaselineMean && divides_by_group(a) && a.singleton == kSingletonZero;
  usual ? centre_tile<true>(a, groups, t) : centre_tile<false>(a, groups, t);
  Out* advantages = static_cast<Out*>(a.advantages) + begin;
  Out* means = static_cast<Out*>(a.mean) + begin;
  Out* stds = static_cast<Out*>(a.std) + begin;
  for (int64_t g = 0; g < groups; ++g) {
    const Centring c{t.shift[g], t.factor[g], t.inverse[g], quiet_nan()};
    const Out mean = Out(t.mean[g]), std = Out(t.std[g]);
    const int64_t end = (g + 1) * size;
    int64_t i = g * size;
    for (; i + 8 <= end; i += 8) {
      store_values<8>(c, values + i, advantages + i);
      store_both<8>(mean, std, means + i, stds + i);
    }
    for (; i + 4 <= end; i += 4) {
      store_values<4>(c, values + i, advantages + i);
      store_both<4>(mean, std, means + i, stds + i);
    }
    for (; i < end; ++i) {
      store_values<1>(c, values + i, advantages + i);
      store_both<1>(mean, std, means + i, stds + i);
    }
  }
}

}  // namespace GK_ISA
}  // namespace grpo_kernels
