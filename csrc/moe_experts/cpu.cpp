// Each row is read once and written once, in blocks that are converted and de-interleaved into buffers in the first-level
// cache. The sum of the backward runs over those buffers and never over the caller's memory, so that addresses do not decide
// its order.

#include "common/parallel.h"
#include "moe_experts/cpu_row.h"

namespace grpo_kernels {
namespace GK_ISA {
namespace {

using namespace glu_kernels;

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
