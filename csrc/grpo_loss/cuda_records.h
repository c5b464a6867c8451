// How a block's sums become a record, and how the blocks that finish last merge all records.
#pragma once

#include "common/cuda_launch.h"
#include "grpo_loss/records.h"

namespace grpo_kernels {
namespace GK_ISA {
namespace loss_kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kInFlight = 4;  // records that a warp loads before it merges them

using Options = LossOptions<float>;

// --- partial sums ------------------------------------------------------------------------------------------------------------

// A thread's share of a record: sums and counts in their slots, of which the compiler drops those that nobody adds to, and
// extremes.
constexpr int kMinima = 3, kMaxima = 4;

struct Partial {
  double sums[kRecord];
  float counts[kRecord];
  float minima[kMinima];  // from slot kRatioMin
  float maxima[kMaxima];  // from slot kRatioMax
};

__device__ __forceinline__ Partial empty_partial() {
  Partial p{};
  for (int j = 0; j < kMinima; ++j) p.minima[j] = infinity<float>();
  for (int j = 0; j < kMaxima; ++j) p.maxima[j] = -infinity<float>();
  return p;
}

// NaN is no extreme.
__device__ __forceinline__ void take_extremes(float value, float& minimum, float& maximum) {
  minimum = value < minimum ? value : minimum;
  maximum = value > maximum ? value : maximum;
}

__device__ float warp_max(float value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const float other = __shfl_xor_sync(kFullMask, value, offset);
    value = other > value ? other : value;
  }
  return value;
}

// Lane i ends with the warp's sum of slot i: every step halves the slots that a lane holds, 31 exchanges instead of 160.
template <int kHalf>
__device__ __forceinline__ double scatter_sums(double (&sums)[kRecord]) {
  const bool upper = (threadIdx.x & kHalf) != 0;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const double sent = upper ? sums[i] : sums[i + kHalf];
    const double kept = upper ? sums[i + kHalf] : sums[i];
    sums[i] = kept + __shfl_xor_sync(kFullMask, sent, kHalf);
  }
  if constexpr (kHalf > 1) return scatter_sums<kHalf / 2>(sums);
  return sums[0];
}

// Slot `lane` of the warp's record.
__device__ __forceinline__ double warp_record(Partial& p) {
  const int lane = threadIdx.x % kWarp;
  static_assert(kRecord == kWarp, "a slot a lane");
#pragma unroll
  for (int j = 0; j < kRecord; ++j) p.sums[j] += double(p.counts[j]);
  double value = scatter_sums<kRecord / 2>(p.sums);
#pragma unroll
  for (int j = 0; j < kMinima; ++j) {
    const float minimum = -warp_max(-p.minima[j]);
    if (lane == kRatioMin + j) value = double(minimum);
  }
#pragma unroll
  for (int j = 0; j < kMaxima; ++j) {
    const float maximum = warp_max(p.maxima[j]);
    if (lane == kRatioMax + j) value = double(maximum);
  }
  return value;
}

// Merges the warps' values of a slot, in order. The result is valid in the first warp.
__device__ double block_record(double value) {
  __shared__ double records[kWarps][kRecord];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  __syncthreads();  // an earlier use has been read
  records[warp][lane] = value;
  __syncthreads();
  double total = empty_slot(lane);
  for (int w = 0; w < kWarps; ++w) total = merge_slot(lane, total, records[w][lane]);
  return total;
}

// Merges `count` records that other blocks wrote. The order depends on their number alone.
__device__ double merge_records(const volatile double* records, int64_t count) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  double total = empty_slot(lane);
  for (int64_t first = warp; first < count; first += kWarps * kInFlight) {
    double values[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int64_t k = first + j * kWarps;
      values[j] = k < count ? records[k * kRecord + lane] : empty_slot(lane);
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) total = merge_slot(lane, total, values[j]);
  }
  return block_record(total);
}

// Whether this block is the last of `expected` to arrive; what the others wrote before they did is then visible.
__device__ bool arrives_last(uint32_t* counter, uint32_t expected) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(counter, 1u) + 1u == expected;
  __syncthreads();
  const bool result = last;
  __threadfence();
  return result;
}

// What the rows add to the totals: every thread counts each 256th row.
__device__ double merge_rows(const GRPOLossArgs& a) {
  Partial p = empty_partial();
  float unused = 0.0f;
  for (int64_t row = threadIdx.x; row < a.layout.batch; row += kThreads) {
    const volatile uint32_t* counters = row_counters(a, row);
    const double tokens = counters[0], clip_low = counters[1], clip_high = counters[2];
    p.sums[kSequences] += row_slot(kSequences, tokens, clip_low, clip_high);
    p.sums[kClipLowRows] += row_slot(kClipLowRows, tokens, clip_low, clip_high);
    p.sums[kClipHighRows] += row_slot(kClipHighRows, tokens, clip_low, clip_high);
    take_extremes(float(row_slot(kClipLowRowMin, tokens, clip_low, clip_high)), p.minima[kClipLowRowMin - kRatioMin], unused);
    take_extremes(float(row_slot(kClipHighRowMax, tokens, clip_low, clip_high)), unused, p.maxima[kClipHighRowMax - kRatioMax]);
  }
  return block_record(warp_record(p));
}

// After the block's record is written: the last block of a group merges the group's records, the last of those blocks
// everything.
__device__ void finish(const GRPOLossArgs& a, const Options& o) {
  const int64_t segments = count_segments(a.layout), groups = count_groups(a.layout), group = blockIdx.x / kGroup;
  const int64_t first = group * kGroup, size = segments - first < kGroup ? segments - first : kGroup;
  if (!arrives_last(a.counters + 1 + group, uint32_t(size))) return;
  const double merged = merge_records(segment_record(a, first), size);
  if (threadIdx.x < kWarp) group_record(a, group)[threadIdx.x] = merged;
  if (!arrives_last(a.counters, uint32_t(groups))) return;
  const double rows = merge_rows(a);
  const double totals = merge_slot(threadIdx.x % kWarp, merge_records(group_record(a, 0), groups), rows);
  __shared__ double results[kRecord];
  if (threadIdx.x < kWarp) results[threadIdx.x] = totals;
  __syncthreads();
  if (threadIdx.x == 0) write_results<float>(a, o, results);
}

}  // namespace
}  // namespace loss_kernels
}  // namespace GK_ISA
}  // namespace grpo_kernels
