#include "common/cuda_launch.h"
#include "moe_permute/formula.h"

namespace grpo_kernels {
namespace GK_ISA {
namespace permutation_kernels {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;

// The slots of a warp: whole groups of 32, in the order of the warps.
struct Slots {
  int64_t begin, end;
};

__device__ Slots slots_of_warp(const BuildPermutationArgs& a) {
  const int64_t tile = tile_slots(a);
  const int64_t each = (tile / kWarp + kWarps - 1) / kWarps * kWarp;
  const int64_t first = tile * blockIdx.x, last = first + tile < a.slots ? first + tile : a.slots;
  const int64_t begin = first + each * (threadIdx.x / kWarp), end = begin + each;
  return {begin, end < last ? end : last};
}

__device__ int load_expert(const BuildPermutationArgs& a, const Slots& s, int64_t slot) {
  return slot < s.end ? local_expert(a, load_id(a, slot)) : -1;
}

// Calls visit(slot, expert, value) with the value of the expert's counter when that slot's turn comes: the counters, which are
// the warp's own, go up by one a slot. Lanes with the same expert find each other, and the first of them counts for all.
template <typename Visit>
__device__ __forceinline__ void count_slots(const BuildPermutationArgs& a, const Slots& s, int32_t* counters,
                                            const Visit& visit) {
  const int lane = threadIdx.x % kWarp;
  int next = load_expert(a, s, s.begin + lane);
#pragma unroll 1
  for (int64_t base = s.begin; base < s.end; base += kWarp) {
    const int expert = next;
    next = load_expert(a, s, base + kWarp + lane);
    const unsigned peers = __match_any_sync(kFullMask, expert);
    const int before = __popc(peers & ((1u << lane) - 1u));
    const int value = expert >= 0 ? counters[expert] : 0;
    __syncwarp();  // all have read before the first one writes
    if (expert >= 0 && before == 0) counters[expert] = value + __popc(peers);
    __syncwarp();
    visit(base + lane, expert, value + before);
  }
}

// Counts the warp's slots, from zero.
__device__ int32_t* count_warp(const BuildPermutationArgs& a, const Slots& s, int experts) {
  int32_t* counters = dynamic_shared<int32_t>() + threadIdx.x / kWarp * experts;
  for (int e = threadIdx.x % kWarp; e < experts; e += kWarp) counters[e] = 0;
  __syncwarp();
  count_slots(a, s, counters, [](int64_t, int, int) {});
  return counters;
}

// What the block's warps have counted for an expert.
__device__ int block_count(int experts, int expert) {
  int sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += dynamic_shared<int32_t>()[w * experts + expert];
  return sum;
}

// A block owns a tile of slots, and each of its warps a part of that with a counter an expert in shared memory. Writes the
// tile's counts, which the second kernel reads. Bytes a slot: 4 or 8, its id.
__global__ void __launch_bounds__(kThreads) count_tiles_kernel(const BuildPermutationArgs a) {
  const int experts = a.last - a.first;
  count_warp(a, slots_of_warp(a), experts);
  __syncthreads();
  for (int e = threadIdx.x; e < experts; e += kThreads) {
    a.workspace[int64_t(blockIdx.x) * experts + e] = block_count(experts, e);
  }
}

// The sum of `value` over the threads before this one, and over all.
__device__ int64_t scan_block(int64_t value, int64_t& total) {
  __shared__ int64_t sums[kWarps];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  int64_t upto = value;
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int64_t other = int64_t(__shfl_up_sync(kFullMask, (long long)(upto), offset));
    if (lane >= offset) upto += other;
  }
  __syncthreads();  // an earlier use has been read
  if (lane == kWarp - 1) sums[warp] = upto;
  __syncthreads();
  int64_t before = 0;
  total = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += sums[w];
    total += sums[w];
  }
  return before + upto - value;
}

// Rows [begin, end) that each lane brings are padding: the warp writes them, lane after lane.
__device__ void write_padding(const BuildPermutationArgs& a, int64_t begin, int64_t end) {
  unsigned lanes = __ballot_sync(kFullMask, begin < end);
  for (; lanes != 0; lanes &= lanes - 1) {
    const int source = __ffs(int(lanes)) - 1;
    const int64_t first = int64_t(__shfl_sync(kFullMask, (long long)(begin), source));
    const int64_t last = int64_t(__shfl_sync(kFullMask, (long long)(end), source));
    for (int64_t row = first + threadIdx.x % kWarp; row < last; row += kWarp) a.inv_map[row] = -1;
  }
}

// Turns the warps' counts into the row of each warp's first slot of an expert, a thread an expert: every block for itself adds
// up the tiles' counts. Writes what depends on the counts alone. Returns the first row behind all segments.
__device__ int64_t place_experts(const BuildPermutationArgs& a, int experts) {
  const int tile = blockIdx.x, tiles = gridDim.x;
  int32_t* counters = dynamic_shared<int32_t>();
  int64_t rows = 0;
  for (int first = 0; first < experts; first += kThreads) {
    const int e = first + threadIdx.x;
    const bool inside = e < experts;
    int before = 0, tokens = inside ? block_count(experts, e) : 0;
#pragma unroll 8
    for (int t = 0; t < tiles; ++t) {
      const int count = inside && t != tile ? a.workspace[int64_t(t) * experts + e] : 0;
      before += t < tile ? count : 0;
      tokens += count;
    }
    const int64_t segment = segment_rows(tokens, a.alignment);
    int64_t all;
    const int64_t start = rows + scan_block(segment, all);
    rows += all;
    if (inside && tile == 0) {
      a.offsets[e] = int32_t(start + segment);
      a.tokens_per_expert[e] = tokens;
    }
    write_padding(a, start + tokens, inside && e % tiles == tile ? start + segment : 0);
    if (!inside) continue;
    int32_t row = int32_t(start + before);
    for (int w = 0; w < kWarps; ++w) {
      const int32_t count = counters[w * experts + e];
      counters[w * experts + e] = row;
      row += count;
    }
  }
  return rows;
}

// As above; the counts then become rows, and the slots are gone through once more, in order, to take them. Padding is written
// by whoever has time: an expert's by block expert % tiles, the rest by all. Bytes a slot: its id, and 8 of both maps; a block
// reads 4 bytes of every tile and expert.
__global__ void __launch_bounds__(kThreads) place_slots_kernel(const BuildPermutationArgs a) {
  const int experts = a.last - a.first;
  const Slots slots = slots_of_warp(a);
  int32_t* counters = count_warp(a, slots, experts);
  __syncthreads();
  const int64_t rows = place_experts(a, experts);
  __syncthreads();
  count_slots(a, slots, counters, [&](int64_t slot, int expert, int row) {
    if (slot < slots.end) a.row_id_map[slot] = expert >= 0 ? row : -1;
    if (expert >= 0) a.inv_map[row] = int32_t(slot);
  });
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t row = rows + int64_t(blockIdx.x) * kThreads + threadIdx.x; row < a.rows; row += step) a.inv_map[row] = -1;
}

}  // namespace
}  // namespace permutation_kernels
}  // namespace GK_ISA

int build_permutation_cuda(const BuildPermutationArgs& a, void* stream) {
  using namespace GK_ISA::permutation_kernels;
  const size_t shared = size_t(kWarps) * size_t(a.last - a.first) * sizeof(int32_t);
  const auto blocks = unsigned(a.tiles);
  // One tile needs no counts of others.
  if (a.tiles > 1) GK_ISA::launch_with_shared(count_tiles_kernel, blocks, kThreads, shared, stream, a);
  GK_ISA::launch_with_shared(place_slots_kernel, blocks, kThreads, shared, stream, a);
  return GK_ISA::launch_status();
}

}  // namespace grpo_kernels
