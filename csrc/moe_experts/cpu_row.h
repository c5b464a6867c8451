// A row's gates and ups on the CPU, in blocks that lie in the first-level cache.
#pragma once

#include "common/cpu_dtype.h"
#include "moe_experts/formula.h"

namespace grpo_kernels {
namespace GK_ISA {
namespace glu_kernels {

constexpr int64_t kBlock = 256;                // a multiple of kPadding
constexpr int64_t kPadding = 64;               // partial sums; blocks are filled up to a multiple of it
constexpr int64_t kElementsPerChunk = 16384;   // per task
constexpr int64_t kElementsPerThread = 32768;  // below that a second thread costs more than it brings

template <typename T, typename A>
inline void load(const T* x, int64_t count, A* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = to_arithmetic(x[i]);
}

template <typename T, typename A>
inline void store(const A* values, int64_t count, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) from_arithmetic(values[i], out[i]);
}

// Gates and ups of the columns that begin at `begin`.
template <typename T, typename A>
inline void load_pairs(const GluRows& l, const T* row, int64_t begin, int64_t count, A* gate, A* up) {
  if (!l.interleaved) {
    load(row + begin, count, gate);
    load(row + l.width + begin, count, up);
    return;
  }
  const T* pairs = row + 2 * begin;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    gate[i] = to_arithmetic(pairs[2 * i]);
    up[i] = to_arithmetic(pairs[2 * i + 1]);
  }
}

template <typename T, typename A>
inline void store_pairs(const GluRows& l, const A* gate, const A* up, int64_t begin, int64_t count, T* row) {
  if (!l.interleaved) {
    store(gate, count, row + begin);
    store(up, count, row + l.width + begin);
    return;
  }
  T* pairs = row + 2 * begin;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    from_arithmetic(gate[i], pairs[2 * i]);
    from_arithmetic(up[i], pairs[2 * i + 1]);
  }
}

// Replaces gates, ups and gradients of the activation by gradients of gates and ups, and by activations; returns
// <gradient, activation>: few terms to a partial sum, and as many on every instruction set.
template <bool kClamped, typename A>
inline double differentiate(const Glu<kClamped, A>& glu, int64_t count, A* gate, A* up, A* grad) {
  for (int64_t i = count; i % kPadding != 0; ++i) gate[i] = up[i] = grad[i] = A(0);
  alignas(64) A sums[kPadding] = {};
  for (int64_t start = 0; start < count; start += kPadding) {
    A *gates = gate + start, *ups = up + start, *grads = grad + start;
#pragma omp simd aligned(gates, ups, grads, sums : 64)
    for (int64_t i = 0; i < kPadding; ++i) {
      const GluGradient<A> gradient = glu.gradient(gates[i], ups[i], grads[i]);
      sums[i] += grads[i] * gradient.activated;
      gates[i] = gradient.gate;
      ups[i] = gradient.up;
      grads[i] = gradient.activated;
    }
  }
  double sum = 0.0;
#pragma omp simd reduction(+ : sum) aligned(sums : 64)
  for (int64_t i = 0; i < kPadding; ++i) sum += double(sums[i]);
  return sum;
}

template <typename A>
inline void scale(int64_t count, A factor, A* values) {
#pragma omp simd aligned(values : 64)
  for (int64_t i = 0; i < count; ++i) values[i] *= factor;
}

inline int threads_for(const GluRows& l, int threads) {
  const int64_t useful = l.rows * l.width / kElementsPerThread;
  return useful < threads ? (useful < 1 ? 1 : int(useful)) : threads;
}

inline int64_t rows_per_chunk(const GluRows& l) {
  const int64_t width = l.width < 1 ? 1 : l.width;
  return width >= kElementsPerChunk ? 1 : kElementsPerChunk / width;
}

}  // namespace glu_kernels
}  // namespace GK_ISA
}  // namespace grpo_kernels
