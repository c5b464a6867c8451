// One row of logits: its softmax in one pass, and the probabilities that a later pass forms from it again.
#pragma once

#include "common/cpu_dtype.h"
#include "speculative_sampling/formula.h"

namespace grpo_kernels {
namespace GK_ISA {
namespace {

constexpr int64_t kBlock = 2048;  // of a row, in the first-level cache
constexpr int64_t kStrip = 256;   // summed at once
constexpr int64_t kPadding = 64;  // a row's last strip is cut to a multiple of it

template <typename A>
constexpr A infinity() {
  return A(__builtin_inf());
}

inline double largest_finite(float) { return 3.4028234663852886e38; }
inline double largest_finite(double) { return 1.7976931348623157e308; }
inline double least_normal(float) { return 1.1754943508222875e-38; }
inline double least_normal(double) { return 2.2250738585072014e-308; }

// e^u is exactly 0 where it is clamped.
inline __attribute__((always_inline)) float bounded(float u) { return -88.0f > u ? -88.0f : u; }
inline __attribute__((always_inline)) double bounded(double u) { return -800.0 > u ? -800.0 : u; }
inline __attribute__((always_inline)) float exp_or_zero(float u) { return exp_clamped(bounded(u)); }
inline __attribute__((always_inline)) double exp_or_zero(double u) { return u < -800.0 ? 0.0 : exp_clamped(bounded(u)); }

// p_j = e^((x_j - max) * factor) / sum over x_j >= threshold. NaN in a row shows in its sums.
template <typename A>
struct Softmax {
  A max, factor, threshold;
  double sum, unfiltered_sum;
  int64_t likeliest;

  bool sound() const { return unfiltered_sum > 0.0 && unfiltered_sum < __builtin_inf(); }
  double exponent(A x) const { return (double(x) - double(max)) * double(factor); }
  double unfiltered_log_prob(A x) const { return exponent(x) - ::log(unfiltered_sum); }
  // What the sums' arithmetic takes for probability zero is zero here, too.
  double log_prob(A x) const {
    const double u = exponent(x);
    return x >= threshold && u >= -largest_finite(A()) ? u - ::log(sum) : -__builtin_inf();
  }
};

// The block as arithmetic values, padded with -inf. Returns its maximum, which passes over NaN.
template <typename T, typename A>
A load_block(const T* x, int64_t count, A* y) {
  A largest = -infinity<A>();
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < count; ++i) {
    const A value = to_arithmetic(x[i]);
    y[i] = value;
    largest = largest < value ? value : largest;
  }
  for (int64_t i = count; i % kPadding != 0; ++i) y[i] = -infinity<A>();
  return largest;
}

// Two terms are added in the arithmetic type before the sum, in double, takes them: the conversion is dear.
template <typename A>
inline double sum_strip(const A* y, int64_t half, A max, A factor, A threshold) {
  double sum = 0.0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < half; ++i) {
    const A first = exp_or_zero((y[i] - max) * factor), second = exp_or_zero((y[i + half] - max) * factor);
    sum += double((y[i] < threshold ? A(0) : first) + (y[i + half] < threshold ? A(0) : second));
  }
  return sum;
}

template <typename A>
double sum_block(const A* y, int64_t count, A max, A factor, A threshold) {
  double sum = 0.0;
  for (int64_t i = 0; i < count; i += kStrip) {
    const int64_t width = count - i < kStrip ? (count - i + kPadding - 1) / kPadding * kPadding : kStrip;
    sum += sum_strip(y + i, width / 2, max, factor, threshold);
  }
  return sum;
}

template <typename A>
int64_t first_equal(const A* y, int64_t count, A value) {
  int64_t i = 0;
  while (i < count && y[i] != value) ++i;
  return i;
}

// The softmax without filters. The row is read once; sums are rebased where a block holds a larger maximum.
template <typename T, typename A>
Softmax<A> softmax_of(const T* x, int64_t vocab, A factor, bool wants_likeliest) {
  alignas(64) A y[kBlock];
  Softmax<A> row{-infinity<A>(), factor, -infinity<A>(), 0.0, 0.0, -1};
  double sum = 0.0;
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int64_t count = vocab - begin < kBlock ? vocab - begin : kBlock;
    const A largest = load_block(x + begin, count, y);
    if (largest > row.max) {
      if (row.max > -infinity<A>()) sum *= ::exp((double(row.max) - double(largest)) * double(factor));
      row.max = largest;
      if (wants_likeliest) row.likeliest = begin + first_equal(y, count, largest);
    }
    const A reference = row.max == -infinity<A>() ? A(0) : row.max;  // only -inf so far: terms of 0, not NaN
    sum += sum_block(y, count, reference, factor, -infinity<A>());
  }
  row.sum = row.unfiltered_sum = sum;
  return row;
}

// w_j = scale * p_j of a block, with a scale that holds 1 / sum.
template <typename T, typename A>
void target_weights(const T* x, int64_t count, const Softmax<A>& p, A scale, A* w) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const A value = to_arithmetic(x[i]);
    const A weight = exp_or_zero((value - p.max) * p.factor) * scale;
    w[i] = value < p.threshold ? A(0) : weight;
  }
}

// w_j = max(w_j - q_j, 0): exactly 0 where both came from equal logits.
template <typename T, typename A>
void subtract_draft(const T* x, int64_t count, const Softmax<A>& q, A* w) {
  const A scale = A(1.0 / q.sum);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const A value = to_arithmetic(x[i]);
    const A weight = exp_or_zero((value - q.max) * q.factor) * scale;
    const A rest = value < q.threshold ? w[i] : w[i] - weight;
    w[i] = rest > A(0) ? rest : A(0);
  }
}

}  // namespace
}  // namespace GK_ISA
}  // namespace grpo_kernels
