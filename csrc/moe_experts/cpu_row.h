// A row's gates and ups on the CPU, in blocks that lie in the first-level cache.
#pragma once

#include "common/cpu_dtype.h"
#include "moe_experts/formula.h"

namespace grpo_kernels {
namespace GK_ISA {
namespace glu_kernels {

constexpr int64_t kBlock = 256;                // a multiple of kPadding
constexpr int64_t kPadding = 64;               // a block's sum runs over whole multiples of it
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
// <gradient, activation>.
template <bool kClamped, typename A>
inline double differentiate(const Glu<kClamped, A>& glu, int64_t count, A* gate, A* up, A* grad) {
  for (int64_t i = count; i % kPadding != 0; ++i) gate[i] = up[i] = grad[i] = A(0);
  const int64_t padded = (count + kPadding - 1) / kPadding * kPadding;
  A sum = 0;
#pragma omp simd reduction(+ : sum) aligned(gate, up, grad : 64)
  for (int64_t i = 0; i < padded; ++i) {
    const GluGradient<A> gradient = glu.gradient(gate[i], up[i], grad[i]);
    sum += grad[i] * gradient.activated;
    gate[i] = gradient.gate;
    up[i] = gradient.up;
    grad[i] = gradient.activated;
  }
  return double(sum);
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
