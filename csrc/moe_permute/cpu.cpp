// The map is a counting sort over parts of the slots, each counted and then placed by one thread; it is stable because
// the parts' counts are summed in order. The moves go token by token: what a token's rows share is read once and stays in
// the caches. Padding rows are zeroed on their own.

#include "common/cpu_dtype.h"
#include "common/parallel.h"
#include "moe_permute/cpu_copy.h"
#include "moe_permute/formula.h"

namespace grpo_kernels {
namespace GK_ISA {
namespace {

constexpr int64_t kBlock = 1024;               // elements of a row that are worked on at a time, in the first-level cache
constexpr int64_t kSumBlock = 2048;            // the same, where only sums must stay there
constexpr int64_t kLanes = 64;                 // partial sums of a product of rows
constexpr int64_t kElementsPerChunk = 131072;  // per task
constexpr int64_t kElementsPerThread = 65536;  // below that a second thread costs more than it brings
constexpr int64_t kRowsPerChunk = 16384;       // whose maps are looked through for padding

// Calls body(begin, end) for ranges of tokens whose rows hold about kElementsPerChunk elements.
template <typename Body>
void for_tokens(int64_t tokens, int64_t hidden, int top_k, int threads, const Body& body) {
  const int64_t elements = hidden * top_k < 1 ? 1 : hidden * top_k;
  const int64_t grain = kElementsPerChunk / elements < 1 ? 1 : kElementsPerChunk / elements;
  parallel_rows(tokens, tokens * elements < kElementsPerThread ? 1 : threads, grain, body);
}

// Keeps the smallest place at which the maps do not belong together.
__attribute__((noinline, cold)) void note(int64_t place, int64_t& fault) {
#pragma omp critical(moe_permute_fault)
  fault = fault < 0 || place < fault ? place : fault;
}

// The row of a slot; -1 where it has none, or where that row is not there or another slot's, which is a fault.
template <typename Args>
inline int64_t row_of(const Args& a, int64_t slot, int64_t& fault) {
  const int64_t row = a.row_id_map[slot];
  if (uint64_t(row) < uint64_t(a.rows) && a.inv_map[row] == slot) return row;
  if (row >= 0) note(slot, fault);
  return -1;
}

// Zeroes the rows that are padding. A row whose slot is not there, or has another row, is a fault: nobody has written it.
template <typename Args>
void zero_padding(const Args& a, void* out, int64_t row_bytes, int threads, int64_t& fault) {
  const int64_t slots = a.tokens * a.top_k;
  const int used = a.rows * row_bytes < 4 * kElementsPerThread ? 1 : threads;
  parallel_rows(a.rows, used, kRowsPerChunk, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t slot = a.inv_map[row];
      if (uint64_t(slot) < uint64_t(slots) && a.row_id_map[slot] == row) continue;
      if (slot >= 0) note(row, fault);
      memset(static_cast<char*>(out) + row * row_bytes, 0, size_t(row_bytes));
    }
  });
}

template <typename A>
A weight_of(const void* topk_weights, int64_t slot) {
  return topk_weights == nullptr ? A(1) : static_cast<const A*>(topk_weights)[slot];
}

// Writes rows: body(slot, row, streamed) for every slot, with row -1 where it has none, and zeroes in the padding of `out`.
// Returns the fault.
template <typename Args, typename Body>
int64_t write_rows(const Args& a, void* out, int64_t element_bytes, int threads, const Body& body) {
  int64_t fault = -1;
  const int64_t bytes = a.hidden * element_bytes;
  const bool streamed = a.rows * bytes >= kStreamedBytes;
  for_tokens(a.tokens, a.hidden, a.top_k, threads, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin * a.top_k; slot < end * a.top_k; ++slot) body(slot, row_of(a, slot, fault), streamed);
    if (streamed) stream_end();
  });
  zero_padding(a, out, bytes, threads, fault);
  return fault;
}

int64_t copy_rows(const MoePermuteArgs& a, int64_t element_bytes, int threads) {
  const int64_t bytes = a.hidden * element_bytes;
  return write_rows(a, a.out, element_bytes, threads, [&](int64_t slot, int64_t row, bool streamed) {
    if (row < 0) return;
    const char* x = static_cast<const char*>(a.x) + slot / a.top_k * a.x_stride * element_bytes;
    copy_bytes(static_cast<char*>(a.out) + row * bytes, x, bytes, streamed);
  });
}

template <typename T>
int64_t scale_rows(const MoePermuteArgs& a, int threads) {
  using A = typename Arithmetic<T>::type;
  return write_rows(a, a.out, sizeof(T), threads, [&](int64_t slot, int64_t row, bool streamed) {
    if (row < 0) return;
    alignas(kLine) T scaled[kBlock];
    const T* x = static_cast<const T*>(a.x) + slot / a.top_k * a.x_stride;
    T* out = static_cast<T*>(a.out) + row * a.hidden;
    const A weight = weight_of<A>(a.topk_weights, slot);
    for (int64_t start = 0; start < a.hidden; start += kBlock) {
      const int64_t count = a.hidden - start < kBlock ? a.hidden - start : kBlock;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) from_arithmetic(to_arithmetic(x[start + i]) * weight, scaled[i]);
      copy_bytes(out + start, scaled, count * int64_t(sizeof(T)), streamed);
    }
  });
}

// Adds weight * source, and fetches as much of the row that comes next: rows lie far apart, no processor foresees that.
template <typename T, typename A>
inline void add_block(const T* source, const T* next, int64_t count, A weight, A* sums) {
  constexpr int64_t kPerLine = kLine / int64_t(sizeof(T));
  constexpr int64_t kStrip = 4 * kPerLine;
  int64_t i = 0;
  for (; i + kStrip <= count; i += kStrip) {
    for (int64_t line = 0; line < 4; ++line) __builtin_prefetch(next + i + line * kPerLine);
#pragma omp simd
    for (int64_t j = 0; j < kStrip; ++j) sums[i + j] += to_arithmetic(source[i + j]) * weight;
  }
  for (; i < count; ++i) sums[i] += to_arithmetic(source[i]) * weight;
}

template <typename T>
int64_t sum_rows(const MoeUnpermuteArgs& a, int threads) {
  using A = typename Arithmetic<T>::type;
  const T* y = static_cast<const T*>(a.y);
  const int64_t slots = a.tokens * a.top_k;
  int64_t fault = -1;
  const auto is_row = [&](int64_t row) { return uint64_t(row) < uint64_t(a.rows); };
  for_tokens(a.tokens, a.hidden, a.top_k, threads, [&](int64_t begin, int64_t end) {
    alignas(kLine) A sums[kSumBlock];
    for (int64_t token = begin; token < end; ++token) {
      for (int64_t start = 0; start < a.hidden; start += kSumBlock) {
        const int64_t count = a.hidden - start < kSumBlock ? a.hidden - start : kSumBlock;
        memset(sums, 0, size_t(count) * sizeof(A));
        for (int64_t slot = token * a.top_k; slot < (token + 1) * a.top_k; ++slot) {
          const int64_t row = a.row_id_map[slot];
          if (!is_row(row)) {
            if (row >= 0) note(slot, fault);
            continue;
          }
          const int64_t next = slot + 1 < slots && is_row(a.row_id_map[slot + 1]) ? a.row_id_map[slot + 1] : row;
          const A weight = weight_of<A>(a.topk_weights, slot);
          add_block(y + row * a.y_stride + start, y + next * a.y_stride + start, count, weight, sums);
        }
        T* out = static_cast<T*>(a.out) + token * a.hidden + start;
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) from_arithmetic(sums[i], out[i]);
      }
    }
  });
  return fault;
}

// <grad, y> over a block, in lanes of their own, and weight * grad. Blocks are added in double.
template <typename T, typename A>
double backward_block(const T* grad, const T* y, int64_t count, A weight, T* grad_y) {
  A lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const A g = to_arithmetic(grad[i + lane]);
      lanes[lane] += g * to_arithmetic(y[i + lane]);
      from_arithmetic(g * weight, grad_y[i + lane]);
    }
  }
  for (int64_t lane = 0; i < count; ++i, ++lane) {
    const A g = to_arithmetic(grad[i]);
    lanes[lane] += g * to_arithmetic(y[i]);
    from_arithmetic(g * weight, grad_y[i]);
  }
  double sum = 0.0;
  for (int64_t lane = 0; lane < kLanes; ++lane) sum += double(lanes[lane]);
  return sum;
}

template <typename T>
int64_t backward_rows(const MoeUnpermuteBackwardArgs& a, int threads) {
  using A = typename Arithmetic<T>::type;
  return write_rows(a, a.grad_y, sizeof(T), threads, [&](int64_t slot, int64_t row, bool streamed) {
    alignas(kLine) T grad_y[kBlock];
    double product = 0.0;
    for (int64_t start = 0; start < a.hidden && row >= 0; start += kBlock) {
      const int64_t count = a.hidden - start < kBlock ? a.hidden - start : kBlock;
      const T* grad = static_cast<const T*>(a.grad) + slot / a.top_k * a.grad_stride + start;
      const T* y = static_cast<const T*>(a.y) + row * a.y_stride + start;
      product += backward_block(grad, y, count, weight_of<A>(a.topk_weights, slot), grad_y);
      copy_bytes(static_cast<T*>(a.grad_y) + row * a.hidden + start, grad_y, count * int64_t(sizeof(T)), streamed);
    }
    static_cast<A*>(a.grad_weights)[slot] = A(product);
  });
}

// Counts the experts of a tile. Returns its first slot with an id out of range, -1 if there is none.
int64_t count_tile(const BuildPermutationArgs& a, int64_t begin, int64_t end, int32_t* counts) {
  memset(counts, 0, size_t(a.last - a.first) * sizeof(int32_t));
  int64_t fault = -1;
  for (int64_t slot = begin; slot < end; ++slot) {
    const int64_t id = load_id(a, slot);
    const int expert = local_expert(a, id);
    if (expert >= 0) ++counts[expert];
    if (id >= a.num_experts && fault < 0) fault = slot;
  }
  return fault;
}

// Turns the tiles' counts into each tile's first row of each expert, and marks the padding.
void lay_out(const BuildPermutationArgs& a) {
  const int experts = a.last - a.first;
  int64_t begin = 0;
  for (int expert = 0; expert < experts; ++expert) {
    int64_t row = begin;
    for (int tile = 0; tile < a.tiles; ++tile) {
      int32_t& count = a.workspace[int64_t(tile) * experts + expert];
      const int64_t next = row + count;
      count = int32_t(row);
      row = next;
    }
    const int64_t end = begin + segment_rows(row - begin, a.alignment);
    a.tokens_per_expert[expert] = int32_t(row - begin);
    a.offsets[expert] = int32_t(end);
    for (; row < end; ++row) a.inv_map[row] = -1;
    begin = end;
  }
  for (; begin < a.rows; ++begin) a.inv_map[begin] = -1;
}

void place_tile(const BuildPermutationArgs& a, int64_t begin, int64_t end, int32_t* next) {
  for (int64_t slot = begin; slot < end; ++slot) {
    const int expert = local_expert(a, load_id(a, slot));
    int32_t row = -1;
    if (expert >= 0) {
      row = next[expert]++;
      a.inv_map[row] = int32_t(slot);
    }
    a.row_id_map[slot] = row;
  }
}

// Calls body(tile, begin, end) for every tile's slots.
template <typename Body>
void for_tiles(const BuildPermutationArgs& a, int threads, const Body& body) {
  const int64_t size = tile_slots(a);
  parallel_rows(a.tiles, threads, 1, [&](int64_t tile, int64_t) {
    const int64_t begin = tile * size < a.slots ? tile * size : a.slots;
    body(tile, begin, begin + size < a.slots ? begin + size : a.slots);
  });
}

}  // namespace

int64_t build_permutation_cpu(const BuildPermutationArgs& a, int threads) {
  const int64_t experts = a.last - a.first;
  int64_t fault = a.slots;
  for_tiles(a, threads, [&](int64_t tile, int64_t begin, int64_t end) {
    const int64_t slot = count_tile(a, begin, end, a.workspace + tile * experts);
    if (slot < 0) return;
#pragma omp critical(build_permutation_fault)
    fault = slot < fault ? slot : fault;
  });
  if (fault < a.slots) return fault;
  lay_out(a);
  for_tiles(a, threads,
            [&](int64_t tile, int64_t begin, int64_t end) { place_tile(a, begin, end, a.workspace + tile * experts); });
  return -1;
}

int64_t moe_permute_cpu(const MoePermuteArgs& a, int threads) {
  return by_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    return a.topk_weights == nullptr ? copy_rows(a, sizeof(T), threads) : scale_rows<T>(a, threads);
  });
}

int64_t moe_unpermute_cpu(const MoeUnpermuteArgs& a, int threads) {
  return by_dtype(a.dtype, [&](auto element) { return sum_rows<decltype(element)>(a, threads); });
}

int64_t moe_unpermute_backward_cpu(const MoeUnpermuteBackwardArgs& a, int threads) {
  return by_dtype(a.dtype, [&](auto element) { return backward_rows<decltype(element)>(a, threads); });
}

}  // namespace GK_ISA
}  // namespace grpo_kernels
