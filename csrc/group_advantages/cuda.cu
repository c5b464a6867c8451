#include "common/cuda_launch.h"
#include "group_advantages/formula.h"

namespace grpo_kernels {
namespace GK_ISA {
namespace {

constexpr int kWarps = 4;        // a block, when groups are independent
constexpr int kBatchWarps = 32;  // the one block, when a batch statistic follows

// The range of positions of the group that a warp's unit of work stands for. Equal groups: unit = group. Ragged groups: unit =
// position, and only the first position of a run has a range.
__device__ bool group_of_unit(const Grouping& g, int64_t unit, int64_t& begin, int64_t& end) {
  if (g.order == nullptr) {
    begin = unit * g.group_size;
    end = begin + g.group_size;
    return true;
  }
  const int64_t id = g.sorted_ids[unit];
  if (unit > 0 && g.sorted_ids[unit - 1] == id) return false;
  const int lane = threadIdx.x % kWarp;
  begin = unit;
  for (end = unit + 1; end < g.batch;) {
    const bool same = end + lane < g.batch && g.sorted_ids[end + lane] == id;
    const unsigned differs = ~__ballot_sync(kFullMask, same);
    if (differs) {
      end += __ffs(int(differs)) - 1;
      break;
    }
    end += kWarp;
  }
  return true;
}

__host__ __device__ int64_t units_of(const Grouping& g) { return g.order == nullptr ? g.batch / g.group_size : g.batch; }

// Statistics of value(position), counted weight(position) times, over [begin, end) by one warp; the order of the sums depends
// on nothing but the range's length.
template <typename Value, typename Weight>
__device__ Statistics warp_statistics(int64_t begin, int64_t end, int correction, const Value& value, const Weight& weight) {
  const int lane = threadIdx.x % kWarp;
  double pivot = 0.0, shifted = 0.0, squared = 0.0, count = 0.0;
  bool have_pivot = false;
  for (int64_t base = begin; base < end; base += kWarp) {
    const double v = base + lane < end ? value(base + lane) : quiet_nan();
    const double n = is_nan(v) ? 0.0 : weight(base + lane);
    const unsigned live = __ballot_sync(kFullMask, n != 0.0);
    if (!have_pivot && live) {
      pivot = __shfl_sync(kFullMask, v, __ffs(int(live)) - 1);
      have_pivot = true;
    }
    if (n != 0.0) {
      shifted += n * (v - pivot);
      count += n;
    }
  }
  count = warp_sum(count);
  const double mean = mean_from_sum(pivot, warp_sum(shifted), count);
  for (int64_t p = begin + lane; p < end; p += kWarp) {
    const double v = value(p);
    const double n = is_nan(v) ? 0.0 : weight(p);
    if (n != 0.0) squared += n * ((v - mean) * (v - mean));
  }
  return {mean, std_from_sum(warp_sum(squared), count, correction), count};
}

__device__ double once(int64_t) { return 1.0; }

template <typename Value>
__device__ double warp_second_best(int64_t begin, int64_t end, const Value& value) {
  BestTwo two = no_best();
  for (int64_t p = begin + threadIdx.x % kWarp; p < end; p += kWarp) {
    const double v = value(p);
    if (!is_nan(v)) two = merge(two, {v, lowest()});
  }
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    two = merge(two, {__shfl_xor_sync(kFullMask, two.best, offset), __shfl_xor_sync(kFullMask, two.second, offset)});
  }
  return two.second;
}

// Centring of a group's values, and its statistics, which singletons alter.
template <typename Value>
__device__ Centring warp_centring(const GroupAdvantagesArgs& a, int64_t begin, int64_t end, const Value& value, Statistics& s) {
  s = warp_statistics(begin, end, a.correction, value, once);
  apply_singleton(a, s);
  Peer peer{0.0, 0.0};
  if (a.baseline == kBaselineLengthWeighted) {
    const auto length = [&](int64_t p) { return length_of(a, sample_at(a.grouping, p)); };
    const Statistics weighted = warp_statistics(begin, end, 0, value, length);
    peer = {weighted.mean, weighted.count};
  } else if (a.baseline == kBaselineSecondBest) {
    peer.value = warp_second_best(begin, end, value);
  }
  return make_centring(a, s, peer);
}

__device__ void centre_group(const GroupAdvantagesArgs& a, int64_t begin, int64_t end) {
  const int lane = threadIdx.x % kWarp;
  const auto combined = [&](int64_t p) { return combined_reward(a, sample_at(a.grouping, p)); };
  Statistics s;
  const Centring c = warp_centring(a, begin, end, combined, s);
  for (int64_t p = begin + lane; p < end; p += kWarp) {
    const int64_t sample = sample_at(a.grouping, p);
    store_value(a.mean, a.dtype, sample, s.mean);
    store_value(a.std, a.dtype, sample, s.std);
    const double value = raised(c, combined(p));
    if (a.aggregation == kNormalizeThenSum) {
      a.scratch[sample] = 0.0;
    } else if (needs_batch(a)) {
      a.scratch[sample] = centred(c, value);
    } else {
      const double result = scaled(centred(c, value), c.inverse);
      store_value(a.advantages, a.dtype, sample, is_scored(a, sample, value) ? result : 0.0);
    }
  }
  if (a.aggregation == kSumThenNormalize) return;
  for (int k = 0; k < a.functions; ++k) {
    const auto reward = [&](int64_t p) { return load_value(a.rewards, a.dtype, sample_at(a.grouping, p) * a.functions + k); };
    Statistics column;
    const Centring centring = warp_centring(a, begin, end, reward, column);
    // A lane adds to its own samples alone, function after function: no two threads share a scratch element.
    for (int64_t p = begin + lane; p < end; p += kWarp) {
      const double value = raised(centring, reward(p));
      if (is_nan(value)) continue;
      const double z = scaled(centred(centring, value), centring.inverse);
      a.scratch[sample_at(a.grouping, p)] += a.weights == nullptr ? z : a.weights[k] * z;
    }
  }
}

// One warp owns a group: it reads the group's rewards three times (they stay in L1), keeps two float64 sums a lane, and writes
// three values a sample. Where a statistic of the whole batch follows, one block does everything so that it stays one launch:
// its first warp forms the batch statistic from the scratch values, in index order, and all warps finish. Bytes: (R + 3) words
// a sample.
__global__ void __launch_bounds__(kBatchWarps* kWarp) group_advantages_kernel(GroupAdvantagesArgs a) {
  const int warp = threadIdx.x / kWarp;
  const int warps = blockDim.x / kWarp;
  const int64_t units = units_of(a.grouping);
  for (int64_t unit = int64_t(blockIdx.x) * warps + warp; unit < units; unit += int64_t(gridDim.x) * warps) {
    int64_t begin, end;
    if (group_of_unit(a.grouping, unit, begin, end)) centre_group(a, begin, end);
  }
  if (!needs_batch(a)) return;
  const bool whiten = whitens_batch(a);

  __shared__ Statistics batch;
  __syncthreads();                    // scratch of all groups is written; visible to this block
  const auto live = [&](int64_t i) {  // what the batch statistic is taken over; NaN is left out
    const double total = combined_reward(a, i);
    return whiten && is_scored(a, i, total) ? a.scratch[i] : total;
  };
  if (warp == 0) {
    const auto length = [&](int64_t i) { return a.normalize_by == kNormalizeBatchTokens ? length_of(a, i) : 1.0; };
    const Statistics s = warp_statistics(0, a.grouping.batch, a.correction, live, length);
    if (threadIdx.x == 0) batch = s;
  }
  __syncthreads();
  const double inverse = inverse_scale_of_batch(a, batch.std);
  for (int64_t i = threadIdx.x; i < a.grouping.batch; i += blockDim.x) {
    const double difference = whiten ? a.scratch[i] - batch.mean : a.scratch[i];
    store_value(a.advantages, a.dtype, i, is_scored(a, i, combined_reward(a, i)) ? scaled(difference, inverse) : 0.0);
  }
}

// One warp owns a group: a minimum and a maximum a lane, then shuffles.
__global__ void informative_groups_kernel(InformativeGroupsArgs a) {
  const int lane = threadIdx.x % kWarp;
  const int64_t units = units_of(a.grouping);
  const int64_t unit = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  int64_t begin, end;
  if (unit >= units || !group_of_unit(a.grouping, unit, begin, end)) return;
  double low = 0.0, high = 0.0;
  bool any = false;
  for (int64_t p = begin + lane; p < end; p += kWarp) {
    const int64_t sample = sample_at(a.grouping, p);
    const double value = load_value(a.rewards, a.dtype, sample);
    if (is_nan(value) || (a.mask != nullptr && !a.mask[sample])) continue;
    low = !any || value < low ? value : low;
    high = !any || value > high ? value : high;
    any = true;
  }
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const double other_low = __shfl_xor_sync(kFullMask, low, offset);
    const double other_high = __shfl_xor_sync(kFullMask, high, offset);
    const bool other_any = __shfl_xor_sync(kFullMask, int(any), offset) != 0;
    low = other_any && (!any || other_low < low) ? other_low : low;
    high = other_any && (!any || other_high > high) ? other_high : high;
    any = any || other_any;
  }
  for (int64_t p = begin + lane; p < end; p += kWarp) {
    a.informative[sample_at(a.grouping, p)] = any && high - low > a.tolerance;
  }
}

// One warp owns a group, one lane a sample: its rank is the number of valid samples before it. G^2 comparisons beat a sort at
// the group sizes of GRPO (8 to 64), whose scores stay in L1.
__global__ void group_rank_kernel(GroupRankArgs a) {
  const int lane = threadIdx.x % kWarp;
  const int64_t units = units_of(a.grouping);
  const int64_t unit = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  int64_t begin, end;
  if (unit >= units || !group_of_unit(a.grouping, unit, begin, end)) return;
  const auto live = [&](int64_t sample, double score) {
    return !is_nan(score) && (a.valid == nullptr || a.valid[sample] != 0);
  };
  for (int64_t p = begin + lane; p < end; p += kWarp) {
    const int64_t sample = sample_at(a.grouping, p);
    const double score = load_value(a.scores, a.dtype, sample);
    int32_t rank = 0;
    for (int64_t q = begin; q < end; ++q) {
      const int64_t other = sample_at(a.grouping, q);
      const double other_score = load_value(a.scores, a.dtype, other);
      rank += live(other, other_score) && ranks_before(other_score, other, score, sample);
    }
    a.rank[sample] = live(sample, score) ? rank : -1;
  }
}

}  // namespace
}  // namespace GK_ISA

int group_advantages_cuda(const GroupAdvantagesArgs& a, void* stream) {
  using namespace GK_ISA;
  if (a.grouping.batch == 0) return 0;
  const bool batch = needs_batch(a);
  const int warps = batch ? kBatchWarps : kWarps;
  const int64_t blocks = batch ? 1 : ceil_div(units_of(a.grouping), warps);
  launch(group_advantages_kernel, unsigned(blocks), warps * kWarp, stream, a);
  return launch_status();
}

int informative_groups_cuda(const InformativeGroupsArgs& a, void* stream) {
  using namespace GK_ISA;
  if (a.grouping.batch == 0) return 0;
  const unsigned blocks = unsigned(ceil_div(units_of(a.grouping), kWarps));
  launch(informative_groups_kernel, blocks, kWarps * kWarp, stream, a);
  return launch_status();
}

int group_rank_cuda(const GroupRankArgs& a, void* stream) {
  using namespace GK_ISA;
  if (a.grouping.batch == 0) return 0;
  const unsigned blocks = unsigned(ceil_div(units_of(a.grouping), kWarps));
  launch(group_rank_kernel, blocks, kWarps * kWarp, stream, a);
  return launch_status();
}

}  // namespace grpo_kernels
