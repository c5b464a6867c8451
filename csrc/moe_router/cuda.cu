#include "moe_router/cuda_gradient.h"
#include "moe_router/cuda_route.h"

namespace grpo_kernels {
namespace GK_ISA {
namespace router_kernels {
namespace {

// --- a chunk -----------------------------------------------------------------------------------------------------------------

// The rows of cu_seqlens that a chunk's tokens lie in; marks the pieces before it, and behind the last one, as free.
struct Rows {
  int first, last;
};

__device__ Rows rows_of_chunk(const MoeRouterArgs& a, const Pieces& p, int begin, int end) {
  if (!a.options.losses[router::kSequenceLoss] || a.sequences.cu_seqlens == nullptr) return {0, 0};
  const int64_t chunk = blockIdx.x;
  const int64_t before = chunk > 0 ? chunk - 1 + bounds_before(a.sequences, begin - 1) : -1;
  const int64_t first = bounds_before(a.sequences, begin);
  const int64_t last = end > begin ? bounds_before(a.sequences, end - 1) : first;
  for (int64_t i = before + 1 + threadIdx.x; i < chunk + first; i += blockDim.x) p.piece_sequence[i] = int32_t(kNoPiece);
  if (chunk == p.chunks - 1) {
    for (int64_t i = chunk + last + 1 + threadIdx.x; i < p.count; i += blockDim.x) p.piece_sequence[i] = int32_t(kNoPiece);
  }
  return {int(first), int(last < first ? first : last)};
}

// The first token behind a row, as far as the chunk goes.
__device__ int end_of_row(const MoeRouterArgs& a, const Rows& rows, int row, int begin, int end) {
  if (row == rows.last) return end;
  const int64_t bound = sequence_end(a.sequences, row);
  return bound < begin ? begin : (bound > end ? end : int(bound));
}

// Writes the sums over a piece: its warps' sums of p, in their order, and what its tokens have chosen.
template <int P>
__device__ void write_piece(const MoeRouterArgs& a, const Pieces& p, const Shared& shared, int row, int live) {
  __shared__ int piece_live[kRouteWarps<P>];
  const int experts = a.rows.experts;
  const bool sequences = a.options.losses[router::kSequenceLoss];
  const int64_t piece = int64_t(blockIdx.x) + row;
  const float* sums = reinterpret_cast<float*>(shared.counts + 2 * experts);
  piece_live[threadIdx.x / kWarp] = live;
  __syncthreads();
  for (int e = threadIdx.x; e < experts; e += kRouteWarps<P> * kWarp) {
    double total = 0.0;
    for (int w = 0; w < kRouteWarps<P>; ++w) total += double(sums[w * kWarp * P + e % P * kWarp + e / P]);
    p.sums[piece * experts + e] = float(total);
    if (!sequences) continue;
    p.chosen[piece * experts + e] = shared.chosen[e];
    shared.chosen[e] = 0;
  }
  if (sequences && threadIdx.x == 0) {
    int total = 0;
    for (int w = 0; w < kRouteWarps<P>; ++w) total += piece_live[w];
    p.piece_live[piece] = total;
    p.piece_sequence[piece] =
        int32_t(a.sequences.cu_seqlens == nullptr ? 0 : (row > a.sequences.count ? kNoSequence : row - 1));
  }
  __syncthreads();
}

// One warp owns a token: E logits in registers, P a lane, from the load to the K chosen; a block owns a chunk of tokens and
// counts their experts in shared memory. Sums over tokens are left to the second launch, a piece of the chunk at a time. Bytes
// a token: E logits, K replayed ids, K weights and ids; and 4 E (12 E with balance losses) for a chunk.
template <int P>
__global__ void __launch_bounds__(kRouteWarps<P>* kWarp, kRouteBlocks<P>) route_kernel(const MoeRouterArgs a, const Plan plan) {
  constexpr int kWarps = kRouteWarps<P>;
  __shared__ Tally tallies[kWarps];
  const Pieces& p = plan.pieces;
  const int experts = a.rows.experts, warp = threadIdx.x / kWarp;
  const Shared shared = shared_memory<P>(a);
  for (int e = threadIdx.x; e < 2 * experts; e += kWarps * kWarp) shared.counts[e] = 0;
  __syncthreads();
  const int64_t first = blockIdx.x * p.tokens, behind = first + p.tokens;
  int begin = int(first);
  const int end = int(behind < a.rows.tokens ? behind : a.rows.tokens);
  const Rows rows = rows_of_chunk(a, p, begin, end);
  Tally tally{};
  for (int row = rows.first; row <= rows.last; ++row) {
    const int stop = end_of_row(a, rows, row, begin, end);
    const int live = tally.live;
    for (int j = 0; j < P && wants_balance(a.options); ++j) shared.sums[j * kWarp + lane_id()] = 0.0f;
    for (int token = begin + warp; token < stop; token += kWarps) route_token<P>(a, plan, token, shared, tally);
    if (wants_balance(a.options)) write_piece<P>(a, p, shared, row, tally.live - live);
    begin = stop;
  }
  if (lane_id() == 0) tallies[warp] = tally;
  __syncthreads();
  for (int e = threadIdx.x; e < experts; e += kWarps * kWarp) p.counts[int64_t(blockIdx.x) * experts + e] = shared.counts[e];
  if (threadIdx.x != 0) return;
  Tally total{};
  for (int w = 0; w < kWarps; ++w) {
    total.z += tallies[w].z;
    total.live += tallies[w].live;
    total.mismatches += tallies[w].mismatches;
  }
  p.z[blockIdx.x] = total.z;
  p.live[blockIdx.x] = total.live;
  p.mismatches[blockIdx.x] = total.mismatches;
  if (blockIdx.x == 0) *p.ticket = 0;
}

// --- the sums ----------------------------------------------------------------------------------------------------------------

constexpr int kSumWarps = 32;
constexpr int kSumThreads = kSumWarps * kWarp;

// Every lane's sum over the warps, in their order. All threads get those of their lane.
template <typename T>
__device__ T sum_over_warps(T value) {
  __shared__ T values[kSumWarps][kWarp];
  __syncthreads();  // an earlier use has been read
  values[threadIdx.x / kWarp][lane_id()] = value;
  __syncthreads();
  T total = 0;
#pragma unroll 4
  for (int w = 0; w < kSumWarps; ++w) total += values[w][lane_id()];
  return total;
}

__device__ int sum_over_block(int value) { return sum_over_warps(__reduce_add_sync(kFullMask, value)); }

// The warp's live tokens of a sequence: its pieces follow each other.
__device__ int live_in_sequence(const MoeRouterArgs& a, const Pieces& p, int64_t sequence) {
  int64_t first = 0, last = p.chunks - 1;
  if (a.sequences.cu_seqlens != nullptr) {
    const int64_t tokens = a.rows.tokens;
    const int64_t bound = sequence_end(a.sequences, sequence), next = sequence_end(a.sequences, sequence + 1);
    const int64_t begin = bound < 0 ? 0 : bound, end = next > tokens ? tokens : next;
    if (begin >= end) return 0;
    first = begin / p.tokens + sequence + 1;
    last = (end - 1) / p.tokens + sequence + 1;
  }
  int live = 0;
#pragma unroll 2
  for (int64_t i = first + lane_id(); i <= last; i += kWarp) live += p.piece_sequence[i] == sequence ? p.piece_live[i] : 0;
  return __reduce_add_sync(kFullMask, live);
}

// A warp's pieces are neighbours, as many as every other warp has.
struct Range {
  int64_t begin, end;
};

__device__ Range pieces_of_warp(const Pieces& p) {
  const int64_t warp = threadIdx.x / kWarp;
  return {p.count * warp / kSumWarps, p.count * (warp + 1) / kSumWarps};
}

// The sum of p over all tokens. With the sequence-wise loss also adds up what each sequence has chosen, in `chosen`, which
// is zero and belongs to this block: once a sequence and warp.
__device__ double sum_pieces(const MoeRouterArgs& a, const Pieces& p, int expert, int* chosen) {
  const int experts = a.rows.experts;
  const int64_t sequences = a.sequences.count;
  const Range range = pieces_of_warp(p);
  double sum = 0.0;
  int64_t sequence = kNoSequence;
  int count = 0;
#pragma unroll 4
  for (int64_t i = range.begin; i < range.end; ++i) {
    const int64_t of = chosen == nullptr ? kNoSequence : p.piece_sequence[i];
    if (of < kNoSequence || of >= sequences) continue;  // free, or never marked because cu_seqlens makes no sense
    sum += double(p.sums[i * experts + expert]);
    if (of == kNoSequence) continue;
    if (of != sequence && count > 0) atomicAdd(chosen + sequence * experts + expert, count);
    count = (of == sequence ? count : 0) + p.chosen[i * experts + expert];
    sequence = of;
  }
  if (count > 0) atomicAdd(chosen + sequence * experts + expert, count);
  return sum;
}

// The sequence-wise loss of the block's experts; leaves the columns in `balance`, where their counts stand.
__device__ double sum_sequences(const MoeRouterArgs& a, const Pieces& p, int expert, bool inside, float* balance) {
  const int experts = a.rows.experts, warp = threadIdx.x / kWarp;
  int nonempty = 0;
#pragma unroll 1
  for (int64_t s = warp; s < a.sequences.count; s += kSumWarps) nonempty += live_in_sequence(a, p, s) > 0;
  nonempty = sum_over_warps(nonempty);
#pragma unroll 1
  for (int64_t s = warp; s < a.sequences.count; s += kSumWarps) {
    const int live = live_in_sequence(a, p, s);
    if (!inside) continue;
    const int count = reinterpret_cast<const int*>(balance)[s * experts + expert];
    balance[s * experts + expert] = float(sequence_column(count, experts, a.rows.top_k, live, nonempty));
  }
  __syncthreads();
  const Range range = pieces_of_warp(p);
  double sum = 0.0;
#pragma unroll 2
  for (int64_t i = range.begin; i < range.end && inside; ++i) {
    const int64_t s = p.piece_sequence[i];
    if (s >= 0 && s < a.sequences.count) sum += double(p.sums[i * experts + expert]) * double(balance[s * experts + expert]);
  }
  return sum_over_warps(sum);
}

// The block's sums, and by the last block that has them the losses.
__device__ void write_losses(const MoeRouterArgs& a, const Pieces& p, double aux, double sequences, int live) {
  const int lane = lane_id();
  if (threadIdx.x / kWarp > 0) return;  // no barrier of the block follows
  aux = warp_sum(aux);
  sequences = warp_sum(sequences);
  bool last = false;
  if (lane == 0) {
    p.slice_sums[2 * blockIdx.x] = aux;
    p.slice_sums[2 * blockIdx.x + 1] = sequences;
    __threadfence();
    last = atomicAdd(p.ticket, 1u) + 1u == gridDim.x;
  }
  if (!__any_sync(kFullMask, last)) return;
  __threadfence();
  const volatile double* slices = p.slice_sums;
  double z = 0.0;
#pragma unroll 4
  for (int64_t i = lane; i < p.chunks; i += kWarp) z += p.z[i];
  z = warp_sum(z);
  aux = warp_sum(lane < p.slices ? slices[2 * lane] : 0.0);
  sequences = warp_sum(lane < p.slices ? slices[2 * lane + 1] : 0.0);
  if (lane > 0) return;
  float* losses = static_cast<float*>(a.losses);
  losses[router::kZLoss] = float(z / at_least_one(live));
  losses[router::kAuxLoss] = float(aux);
  losses[router::kSequenceLoss] = float(sequences);
}

// A block owns 32 experts, a lane each, and its warps share the chunks: sums of integers, and of p in the order of the pieces.
// Loss = sum over tokens of <v, p>, with a column v an expert that comes from counts alone; the last block adds up the blocks'
// parts. Bytes: 4 E a chunk; with balance losses up to 16 E a piece, and 4 E a sequence.
__global__ void __launch_bounds__(kSumThreads) sum_kernel(const MoeRouterArgs a, const Pieces p) {
  const int experts = a.rows.experts, expert = blockIdx.x * kSlice + lane_id(), warp = threadIdx.x / kWarp;
  const bool inside = expert < experts, first = blockIdx.x == 0 && threadIdx.x == 0;
  const bool aux = a.options.losses[router::kAuxLoss], sequences = a.options.losses[router::kSequenceLoss];
  float* columns = static_cast<float*>(a.balance);
  float* balance = columns + (aux ? experts : 0);
  int* chosen = sequences ? reinterpret_cast<int*>(balance) : nullptr;
  for (int64_t s = warp; sequences && inside && s < a.sequences.count; s += kSumWarps) chosen[s * experts + expert] = 0;

  int live = 0, mismatches = 0, count = 0;
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < p.chunks; i += kSumThreads) {
    live += p.live[i];
    mismatches += p.mismatches[i];
  }
#pragma unroll 8
  for (int64_t i = warp; i < p.chunks; i += kSumWarps) count += inside ? p.counts[i * experts + expert] : 0;
  live = sum_over_block(live);
  mismatches = sum_over_block(mismatches);
  count = sum_over_warps(count);
  if (warp == 0 && inside) a.per_expert[expert] = count;
  if (first) {
    *a.live_tokens = live;
    *a.mismatch = mismatches;
  }
  if (!aux && !sequences && !a.options.losses[router::kZLoss]) {
    if (blockIdx.x == 0 && threadIdx.x < router::kLosses) static_cast<float*>(a.losses)[threadIdx.x] = 0.0f;
    return;
  }
  double aux_loss = 0.0, sequence_loss = 0.0;
  if (aux || sequences) {
    const double sum = sum_over_warps(inside ? sum_pieces(a, p, expert, chosen) : 0.0);
    if (aux && inside) {
      const double column = aux_column(count, experts, a.rows.top_k, live);
      if (warp == 0) columns[expert] = float(column);
      aux_loss = column * sum;
    }
    if (sequences) sequence_loss = sum_sequences(a, p, expert, inside, balance);
  }
  write_losses(a, p, aux_loss, sequence_loss, live);
}

// --- the gradient ------------------------------------------------------------------------------------------------------------

constexpr int kGradientWarps = 8;

// One warp owns a token. A lane forms the gradient of its P experts in registers; those of the chosen join it in shared memory,
// from where the row is written once, in the order of memory. Bytes a token: E logits and E gradients, 12 K; with balance
// losses the column of its sequence, which stays in the caches.
template <int P>
__global__ void __launch_bounds__(kGradientWarps* kWarp)
    gradient_kernel(const MoeRouterBackwardArgs a, const Access access, const bool whole_gradient) {
  __shared__ __align__(16) float rows[kGradientWarps][kWarp * P];
  const int warp = threadIdx.x / kWarp;
  const int64_t token = int64_t(blockIdx.x) * kGradientWarps + warp;
  if (token >= a.rows.tokens) return;
  token_gradient<P>(a, access, token, rows[warp]);
  __syncwarp();
  store_gradient(a, whole_gradient, token, rows[warp]);
}

}  // namespace
}  // namespace router_kernels
}  // namespace GK_ISA

namespace {

using namespace GK_ISA::router_kernels;

bool is_multiple(const void* address, int64_t bytes) { return reinterpret_cast<uintptr_t>(address) % uintptr_t(bytes) == 0; }

// Whether a lane's `each` elements of every row are inside or outside together, and aligned to a vector.
bool are_whole(const void* data, int64_t stride, int experts, int each, int element_bytes) {
  const int bytes = each * element_bytes, vector = bytes < 16 ? bytes : 16;
  return experts % each == 0 && is_multiple(data, vector) && stride * element_bytes % vector == 0;
}

int bytes_of(int dtype) { return dtype == kFloat32 ? 4 : 2; }

int lanes_of_group(const MoeRouterArgs& a, int each) {
  const int size = a.rows.experts / a.n_group, lanes = size / each;
  return size % each == 0 && (lanes & (lanes - 1)) == 0 ? lanes : 0;
}

template <int P>
void launch_route(const MoeRouterArgs& a, const Pieces& pieces, void* stream) {
  Plan plan{pieces, {}, a.bias != nullptr || a.n_group > 1};
  const RouterRows& rows = a.rows;
  plan.access.whole_rows = are_whole(rows.logits, rows.row_stride, rows.experts, P, bytes_of(rows.dtype));
  plan.access.whole_bias = are_whole(a.bias, 0, rows.experts, P, int(sizeof(float)));
  plan.access.group_lanes = lanes_of_group(a, P);
  const int numbers = (wants_balance(a.options) ? 1 : 0) + (a.n_group > 1 && plan.access.group_lanes == 0 ? 1 : 0);
  const size_t shared = sizeof(int32_t) * size_t(2 * rows.experts + numbers * kRouteWarps<P> * GK_ISA::kWarp * P);
  const auto threads = unsigned(kRouteWarps<P> * GK_ISA::kWarp);
  GK_ISA::launch_with_shared(route_kernel<P>, unsigned(pieces.chunks), threads, shared, stream, a, plan);
}

template <int P>
void launch_gradient(const MoeRouterBackwardArgs& a, void* stream) {
  const RouterRows& rows = a.rows;
  const int bytes = bytes_of(rows.dtype);
  Access access{};
  access.whole_rows = are_whole(rows.logits, rows.row_stride, rows.experts, P, bytes);
  const bool whole_gradient = are_whole(a.grad_logits, rows.experts, rows.experts, 16 / bytes, bytes);
  const auto blocks = unsigned(GK_ISA::ceil_div(rows.tokens, kGradientWarps));
  const auto threads = unsigned(kGradientWarps * GK_ISA::kWarp);
  GK_ISA::launch(gradient_kernel<P>, blocks, threads, stream, a, access, whole_gradient);
}

using LaunchRoute = void (*)(const MoeRouterArgs&, const Pieces&, void*);
using LaunchGradient = void (*)(const MoeRouterBackwardArgs&, void*);
constexpr LaunchRoute kLaunchRoute[] = {launch_route<1>, launch_route<2>,  launch_route<4>,
                                        launch_route<8>, launch_route<16>, launch_route<32>};
constexpr LaunchGradient kLaunchGradient[] = {launch_gradient<1>, launch_gradient<2>,  launch_gradient<4>,
                                              launch_gradient<8>, launch_gradient<16>, launch_gradient<32>};

// Which of them has the fewest experts a lane that suffice.
int size_class(int experts) {
  int result = 0;
  while (GK_ISA::kWarp << result < experts) ++result;
  return result;
}

}  // namespace

int moe_router_cuda(const MoeRouterArgs& a, void* stream) {
  const RouterSequences& s = a.sequences;
  Pieces pieces = cut_tokens(a.rows.tokens, a.rows.experts, s.cu_seqlens != nullptr, s.count, a.options.losses);
  lay_out(pieces, a.rows.experts, a.options.losses, a.workspace);
  kLaunchRoute[size_class(a.rows.experts)](a, pieces, stream);
  GK_ISA::launch(sum_kernel, unsigned(pieces.slices), kSumThreads, stream, a, pieces);
  return GK_ISA::launch_status();
}

int moe_router_backward_cuda(const MoeRouterBackwardArgs& a, void* stream) {
  if (a.rows.tokens == 0) return 0;
  kLaunchGradient[size_class(a.rows.experts)](a, stream);
  return GK_ISA::launch_status();
}

}  // namespace grpo_kernels
