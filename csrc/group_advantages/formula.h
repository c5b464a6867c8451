// The maths of group statistics, in float64, for the CPU and CUDA kernels alike.
//
// A mean is pivot + mean(value - pivot), the pivot being the first live value, and the variance is a second pass about that
// mean. Equal values therefore give a deviation of exactly 0, which E[x^2] - E[x]^2 does not.
#pragma once

#include <cmath>

#include "common/math.h"
#include "group_advantages/group_advantages.h"

namespace grpo_kernels {
namespace GK_ISA {

GK_HOST_DEVICE bool is_nan(double value) { return value != value; }
GK_HOST_DEVICE double quiet_nan() { return double(bits_to_float(0x7fc00000u)); }
GK_HOST_DEVICE double lowest() { return double(bits_to_float(0xff800000u)); }

GK_HOST_DEVICE double load_value(const void* data, int dtype, int64_t index) {
  switch (dtype) {
    case kFloat64:
      return static_cast<const double*>(data)[index];
    case kBFloat16:
      return to_arithmetic(static_cast<const bfloat16*>(data)[index]);
    case kFloat16:
      return to_arithmetic(static_cast<const float16*>(data)[index]);
    default:
      return static_cast<const float*>(data)[index];
  }
}

GK_HOST_DEVICE void store_value(void* data, int input_dtype, int64_t index, double value) {
  if (input_dtype == kFloat64) {
    static_cast<double*>(data)[index] = value;
  } else {
    static_cast<float*>(data)[index] = float(value);
  }
}

// The sample at a position of the grouped order.
GK_HOST_DEVICE int64_t sample_at(const Grouping& g, int64_t position) {
  return g.order == nullptr ? position : g.order[position];
}

// Weighted sum of the rewards that were scored; NaN if none was. Fused by name: if the compiler chose where to fuse, two copies
// of this function could differ in the last bit, and equal rewards would no longer give exactly 0.
GK_HOST_DEVICE double combined_reward(const GroupAdvantagesArgs& a, int64_t sample) {
  double sum = 0.0;
  bool scored = false;
  for (int k = 0; k < a.functions; ++k) {
    const double value = load_value(a.rewards, a.dtype, sample * a.functions + k);
    if (is_nan(value)) continue;
    sum = a.weights == nullptr ? sum + value : multiply_add(a.weights[k], value, sum);
    scored = true;
  }
  return scored ? sum : quiet_nan();
}

// Whether any function scored the sample, given its total reward: infinities of both signs also add up to NaN.
GK_HOST_DEVICE bool is_scored(const GroupAdvantagesArgs& a, int64_t sample, double total) {
  if (!is_nan(total)) return true;
  const bool combined = a.functions > 1 || a.weights != nullptr;
  for (int k = 0; k < a.functions && combined; ++k) {
    if (!is_nan(load_value(a.rewards, a.dtype, sample * a.functions + k))) return true;
  }
  return false;
}

// Tokens of a response; NaN for what is no length, so that it shows in whatever it takes part in.
GK_HOST_DEVICE double length_of(const GroupAdvantagesArgs& a, int64_t sample) {
  const double length = a.lengths[sample];
  return length >= 0.0 && length - length == 0.0 ? length : quiet_nan();
}

// `count` is of values, or of tokens where every value counts as often as its response has tokens.
struct Statistics {
  double mean;
  double std;
  double count;
};

GK_HOST_DEVICE double mean_from_sum(double pivot, double shifted_sum, double count) {
  return count == 0.0 ? 0.0 : pivot + shifted_sum / count;
}

GK_HOST_DEVICE double std_from_sum(double squared_sum, double count, int correction) {
  return count <= correction ? 0.0 : sqrt(squared_sum / (count - correction));
}

// The two largest values; equal ones count one by one.
struct BestTwo {
  double best, second;
};

GK_HOST_DEVICE BestTwo no_best() { return {lowest(), lowest()}; }

GK_HOST_DEVICE BestTwo merge(const BestTwo& a, const BestTwo& b) {
  const double low = a.best < b.best ? a.best : b.best;
  const double second = a.second > b.second ? a.second : b.second;
  return {a.best > b.best ? a.best : b.best, low > second ? low : second};
}

// A group of one has no peers to compare with: zero, or verl's convention of mean 0 and deviation 1.
GK_HOST_DEVICE void apply_singleton(const GroupAdvantagesArgs& a, Statistics& s) {
  if (s.count == 1 && a.singleton == kSingletonRaw) {
    s.mean = 0.0;
    s.std = 1.0;
  }
}

GK_HOST_DEVICE bool divides_by_group(const GroupAdvantagesArgs& a) {
  return a.normalize_by == kNormalizeGroup || a.aggregation == kNormalizeThenSum;
}

// Whether the mean of the batch is subtracted, of its samples or of its tokens.
GK_HOST_DEVICE bool whitens_batch(const GroupAdvantagesArgs& a) {
  return a.normalize_by == kNormalizeBatchTokens || a.aggregation == kNormalizeThenSum;
}

GK_HOST_DEVICE bool needs_batch(const GroupAdvantagesArgs& a) { return a.normalize_by == kNormalizeBatch || whitens_batch(a); }

// How a group's rewards become advantages, worked out once a group: raised to the floor, which is NaN where there is none,
// (value - shift) * factor, and that times inverse.
struct Centring {
  double shift, factor, inverse, floor;
};

GK_HOST_DEVICE double inverse_scale(double std, double eps) { return 1.0 / (std + eps); }

GK_HOST_DEVICE double inverse_scale_of_batch(const GroupAdvantagesArgs& a, double std) {
  return a.normalize_by == kNormalizeBatchTokens ? 1.0 / sqrt(std * std + a.batch_eps) : inverse_scale(std, a.batch_eps);
}

// What a baseline compares with beyond the group's statistics: the length-weighted mean and its tokens, or the second best.
struct Peer {
  double value, tokens;
};

GK_HOST_DEVICE Centring make_centring(const GroupAdvantagesArgs& a, const Statistics& s, const Peer& peer) {
  Centring c{0.0, 1.0, divides_by_group(a) ? inverse_scale(s.std, a.eps) : 1.0, quiet_nan()};
  const bool uses_group = a.baseline != kBaselineNone || divides_by_group(a);
  if (s.count == 1 && uses_group) {
    c.factor = a.singleton == kSingletonRaw ? 1.0 : 0.0;
  } else if (a.baseline == kBaselineLengthWeighted) {
    c.shift = peer.value;
    if (peer.tokens == 0.0) c.factor = 0.0;
  } else if (a.baseline == kBaselineSecondBest) {
    c.shift = c.floor = s.mean - s.mean == 0.0 ? peer.value : quiet_nan();
  } else if (a.baseline != kBaselineNone) {
    c.shift = s.mean;
    if (a.baseline == kBaselineLeaveOneOut && s.count > 1.0) c.factor = s.count / (s.count - 1.0);
  }
  return c;
}

GK_HOST_DEVICE double raised(const Centring& c, double value) { return value <= c.floor ? c.floor : value; }

GK_HOST_DEVICE double centred(const Centring& c, double value) { return c.factor == 0.0 ? 0.0 : (value - c.shift) * c.factor; }

// 0 / (0 + eps) is 0 for every eps, 0 included: a group of equal rewards teaches nothing.
GK_HOST_DEVICE double scaled(double difference, double inverse) { return difference == 0.0 ? 0.0 : difference * inverse; }

// Orders samples of a group from best to worst; the lower index wins a tie.
GK_HOST_DEVICE bool ranks_before(double score, int64_t sample, double other_score, int64_t other_sample) {
  return score > other_score || (score == other_score && sample < other_sample);
}

}  // namespace GK_ISA
}  // namespace grpo_kernels
