// Each row is read once and written once, in blocks that are converted and de-interleaved into buffers in the first-level
// cache. The sum of the backward runs over those buffers and never over the caller's memory, so that addresses do not decide
// its order.

#include "common/cpu_dtype.h"
#include "common/parallel.h"
#include "moe_experts/formula.h"

namespace grpo_kernels {
namespace GK_ISA {
namespace {

constexpr int64_t kBlock = 256;                // a multiple of kPadding
constexpr int64_t kPadding = 64;               // a block's sum runs over whole multiples of it
constexpr int64_t kElementsPerChunk = 16384;   // per task
constexpr int64_t kElementsPerThread = 32768;  // below that a second thread costs more than it brings

template <typename T, typename A>
void load(const T* x, int64_t count, A* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = to_arithmetic(x[i]);
}

template <typename T, typename A>
void store(const A* values, int64_t count, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) from_arithmetic(values[i], out[i]);
}

// Gates and ups of the columns that begin at `begin`.
template <typename T, typename A>
void load_pairs(const GluRows& l, const T* row, int64_t begin, int64_t count, A* gate, A* up) {
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
void store_pairs(const GluRows& l, const A* gate, const A* up, int64_t begin, int64_t count, T* row) {
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

template <typename T>
void clear(void* base, int64_t row, int64_t width) {
  if (base != nullptr) memset(static_cast<T*>(base) + row * width, 0, size_t(width) * sizeof(T));
}

template <bool kClamped, typename T>
void forward_row(const MoeGluArgs& a, int64_t row) {
  using A = typename Arithmetic<T>::type;
  const GluRows& l = a.layout;
  const int32_t slot = l.inv_map[row];
  if (slot < 0) return clear<T>(a.activated, row, l.width);
  const Glu<kClamped, A> glu{A(l.alpha), A(l.limit)};
  const A weight = l.weights == nullptr ? A(1) : static_cast<const A*>(l.weights)[slot];
  const T* preact = static_cast<const T*>(l.preact) + row * 2 * l.width;
  T* activated = static_cast<T*>(a.activated) + row * l.width;
  alignas(64) A gate[kBlock], up[kBlock];
  for (int64_t begin = 0; begin < l.width; begin += kBlock) {
    const int64_t count = l.width - begin < kBlock ? l.width - begin : kBlock;
    load_pairs(l, preact, begin, count, gate, up);
#pragma omp simd aligned(gate, up : 64)
    for (int64_t i = 0; i < count; ++i) gate[i] = weight * glu.value(gate[i], up[i]);
    store(gate, count, activated + begin);
  }
}

// Replaces gates, ups and gradients of the activation by gradients of gates and ups, and by activations; returns
// <gradient, activation>.
template <bool kClamped, typename A>
double differentiate(const Glu<kClamped, A>& glu, int64_t count, A* gate, A* up, A* grad) {
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
void scale(int64_t count, A factor, A* values) {
#pragma omp simd aligned(values : 64)
  for (int64_t i = 0; i < count; ++i) values[i] *= factor;
}

template <bool kClamped, typename T>
void backward_row(const MoeGluBackwardArgs& a, int64_t row) {
  using A = typename Arithmetic<T>::type;
  const GluRows& l = a.layout;
  const int32_t slot = l.inv_map[row];
  if (slot < 0) {
    clear<T>(a.grad_preact, row, 2 * l.width);
    clear<T>(a.activated, row, l.width);
    return;
  }
  const Glu<kClamped, A> glu{A(l.alpha), A(l.limit)};
  const A weight = static_cast<const A*>(l.weights)[slot];
  const T* preact = static_cast<const T*>(l.preact) + row * 2 * l.width;
  const T* grad_activated = static_cast<const T*>(a.grad_activated) + row * l.width;
  alignas(64) A gate[kBlock], up[kBlock], grad[kBlock];
  double sum = a.row_terms == nullptr ? 0.0 : double(static_cast<const A*>(a.row_terms)[row]);
  for (int64_t begin = 0; begin < l.width; begin += kBlock) {
    const int64_t count = l.width - begin < kBlock ? l.width - begin : kBlock;
    load_pairs(l, preact, begin, count, gate, up);
    load(grad_activated + begin, count, grad);
    sum += differentiate(glu, count, gate, up, grad);
    if (a.grad_preact != nullptr) {
      scale(count, weight, gate);
      scale(count, weight, up);
      store_pairs(l, gate, up, begin, count, static_cast<T*>(a.grad_preact) + row * 2 * l.width);
    }
    if (a.activated != nullptr) {
      scale(count, weight, grad);
      store(grad, count, static_cast<T*>(a.activated) + row * l.width + begin);
    }
  }
  if (a.grad_weights != nullptr) static_cast<A*>(a.grad_weights)[slot] = A(sum);
}

int threads_for(const GluRows& l, int threads) {
  const int64_t useful = l.rows * l.width / kElementsPerThread;
  return useful < threads ? (useful < 1 ? 1 : int(useful)) : threads;
}

int64_t rows_per_chunk(const GluRows& l) { return l.width >= kElementsPerChunk ? 1 : kElementsPerChunk / l.width; }

struct Forward {
  using Args = MoeGluArgs;
  template <bool kClamped, typename T>
  static void row(const Args& a, int64_t index) {
    forward_row<kClamped, T>(a, index);
  }
};

struct Backward {
  using Args = MoeGluBackwardArgs;
  template <bool kClamped, typename T>
  static void row(const Args& a, int64_t index) {
    backward_row<kClamped, T>(a, index);
  }
};

template <typename Pass, bool kClamped, typename T>
int64_t run(const typename Pass::Args& a, int threads) {
  const GluRows& l = a.layout;
  const int64_t slots = l.weights == nullptr ? INT64_MAX : l.slots;
  int64_t fault = -1;
  parallel_rows(l.rows, threads_for(l, threads), rows_per_chunk(l), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (l.inv_map[row] < slots) {
        Pass::template row<kClamped, T>(a, row);
      } else {
#pragma omp critical(moe_glu_fault)
        fault = fault < 0 || row < fault ? row : fault;
      }
    }
  });
  return fault;
}

template <typename Pass, typename T>
int64_t run(const typename Pass::Args& a, int threads) {
  return a.layout.clamped ? run<Pass, true, T>(a, threads) : run<Pass, false, T>(a, threads);
}

template <typename Pass>
int64_t run(const typename Pass::Args& a, int threads) {
  return by_dtype(a.layout.dtype, [&](auto element) { return run<Pass, decltype(element)>(a, threads); });
}

}  // namespace

int64_t moe_glu_cpu(const MoeGluArgs& args, int threads) { return run<Forward>(args, threads); }

int64_t moe_glu_backward_cpu(const MoeGluBackwardArgs& args, int threads) { return run<Backward>(args, threads); }

}  // namespace GK_ISA
}  // namespace grpo_kernels
