// Forward: each row is read once, in blocks of 2048 that are transformed into a buffer in the first-level cache; the
// maximum of a block first, then its sums, while the next block is fetched. Backward: each row is read once and its gradient
// written, over the logits if wished.
//
// The sums run over the aligned buffer and never over the caller's memory, so neither addresses nor other rows decide
// their order.

#include "common/cpu_dtype.h"
#include "common/cpu_lanes.h"
#include "common/parallel.h"
#include "token_log_probs/formula.h"

namespace grpo_kernels {
namespace GK_ISA {
namespace {

constexpr int64_t kBlock = 2048;
constexpr int64_t kLanes = 16, kStrip = 4 * kLanes;  // of a strip, every lane has four elements
constexpr int64_t kBytesAhead = 2048;                // that the backward fetches
constexpr int64_t kElementsPerChunk = 32768;         // per task
constexpr int64_t kElementsPerThread = 65536;        // below that a second thread costs more than it brings

template <typename A>
A infinity() {
  return infinity_of(A());
}

int64_t token_id(const TokenTransform& t, int64_t row) {
  return t.wide_ids ? static_cast<const int64_t*>(t.token_ids)[row] : static_cast<const int32_t*>(t.token_ids)[row];
}

bool is_live(const TokenTransform& t, int64_t row) { return token_id(t, row) >= 0 && (t.mask == nullptr || t.mask[row] != 0); }

template <typename A>
Transform<A> row_transform(const TokenTransform& t, int64_t row) {
  const double temperature = t.temperatures == nullptr
                                 ? t.temperature
                                 : double(static_cast<const A*>(t.temperatures)[t.temperature_per_row ? row : 0]);
  return Transform<A>::make(t.logit_scale, t.softcap, temperature);
}

int64_t row_offset(const LogitRows& l, int64_t row) { return row / l.inner * l.outer_stride + row % l.inner * l.inner_stride; }

template <typename A>
void store(void* base, int64_t row, double value) {
  if (base != nullptr) static_cast<A*>(base)[row] = A(value);
}

// The block's y, padded with -inf to whole strips. Returns its maximum; beside a NaN, any of its values.
template <bool kCapped, typename T, typename A>
A load_block(const T* x, int64_t count, const Transform<A>& transform, A* y) {
  alignas(64) A largest[kLanes];
  for (int64_t l = 0; l < kLanes; ++l) largest[l] = -infinity<A>();
  int64_t i = 0;
  for (; i + kStrip <= count; i += kStrip) {
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) {
      const A v0 = transform.template apply<kCapped>(to_arithmetic(x[i + l]));
      const A v1 = transform.template apply<kCapped>(to_arithmetic(x[i + kLanes + l]));
      const A v2 = transform.template apply<kCapped>(to_arithmetic(x[i + 2 * kLanes + l]));
      const A v3 = transform.template apply<kCapped>(to_arithmetic(x[i + 3 * kLanes + l]));
      y[i + l] = v0;
      y[i + kLanes + l] = v1;
      y[i + 2 * kLanes + l] = v2;
      y[i + 3 * kLanes + l] = v3;
      largest[l] = larger(largest[l], larger(larger(v0, v1), larger(v2, v3)));
    }
  }
  A rest = -infinity<A>();
#pragma omp simd reduction(max : rest)
  for (int64_t k = i; k < count; ++k) {
    const A value = transform.template apply<kCapped>(to_arithmetic(x[k]));
    y[k] = value;
    rest = larger(rest, value);
  }
  for (int64_t k = count; k % kStrip != 0; ++k) y[k] = -infinity<A>();
  for (int64_t l = 0; l < kLanes; ++l) rest = larger(rest, largest[l]);
  return rest;
}

// What is fetched while a block is computed: `bytes` from `data` on, so many with each strip.
struct NextBlock {
  const char* data;
  int64_t bytes, per_strip;
};

// Sums over a block of whole strips. A lane's four terms are added in the arithmetic type before its sum, in double, takes
// them: the conversion is dear, and three roundings lose nothing that one would keep.
template <bool kWeighted, bool kSquared, typename A>
void add_block(const A* y, int64_t count, A y_max, A out, NextBlock next, RowSums& sums) {
  alignas(64) double sum[kLanes] = {}, weighted[kLanes] = {}, squared[kLanes] = {};
  for (int64_t i = 0; i < count; i += kStrip) {
    prefetch(next.data, next.bytes < next.per_strip ? next.bytes : next.per_strip);
    next.data += next.per_strip;
    next.bytes -= next.per_strip;
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) {
      const A u0 = clamp_exponent((y[i + l] - y_max) * out);
      const A u1 = clamp_exponent((y[i + kLanes + l] - y_max) * out);
      const A u2 = clamp_exponent((y[i + 2 * kLanes + l] - y_max) * out);
      const A u3 = clamp_exponent((y[i + 3 * kLanes + l] - y_max) * out);
      const A e0 = exp_clamped(u0);
      const A e1 = exp_clamped(u1);
      const A e2 = exp_clamped(u2);
      const A e3 = exp_clamped(u3);
      sum[l] += double((e0 + e1) + (e2 + e3));
      if (kWeighted) weighted[l] += double(multiply_add(e0, u0, e1 * u1) + multiply_add(e2, u2, e3 * u3));
      if (kSquared) squared[l] += double(multiply_add(e0, e0, e1 * e1) + multiply_add(e2, e2, e3 * e3));
    }
  }
  sums.sum += sum_lanes(sum);
  if (kWeighted) sums.weighted += sum_lanes(weighted);
  if (kSquared) sums.squared += sum_lanes(squared);
}

template <typename A>
int64_t first_equal(const A* y, int64_t count, A value) {
  for (int64_t i = 0; i < count; ++i) {
    if (y[i] == value) return i;
  }
  return -1;
}

template <typename A>
struct RowResult {
  RowSums sums;
  A y_max, y_target;
  int64_t top1;

  bool finite() const { return is_finite(y_max) && is_finite(sums.sum); }
};

template <bool kCapped, bool kWeighted, bool kSquared, typename T, typename A>
RowResult<A> reduce_row(const T* x, int64_t vocab, const Transform<A>& transform, bool wants_top1) {
  alignas(64) A y[kBlock];
  RowResult<A> row{{0.0, 0.0, 0.0}, -infinity<A>(), A(0), -1};
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int64_t count = vocab - begin < kBlock ? vocab - begin : kBlock;
    const A largest = load_block<kCapped>(x + begin, count, transform, y);
    if (largest > row.y_max) {
      if (row.y_max > -infinity<A>()) row.sums.rebase((double(row.y_max) - double(largest)) * double(transform.out));
      row.y_max = largest;
      if (wants_top1) row.top1 = begin + first_equal(y, count, largest);
    }
    const A reference = row.y_max == -infinity<A>() ? A(0) : row.y_max;  // only -inf so far: terms of 0, not NaN
    const int64_t ahead = vocab - begin - kBlock < kBlock ? vocab - begin - kBlock : kBlock;
    const NextBlock next{reinterpret_cast<const char*>(x + begin + kBlock), ahead * int64_t(sizeof(T)),
                         kStrip * int64_t(sizeof(T))};
    const int64_t whole = (count + kStrip - 1) / kStrip * kStrip;
    add_block<kWeighted, kSquared>(y, whole, reference, transform.out, next, row.sums);
  }
  return row;
}

template <bool kCapped, typename T, typename A>
RowResult<A> reduce_row(const T* x, int64_t vocab, const Transform<A>& transform, bool weighted, bool squared, bool top1) {
  if (weighted && squared) return reduce_row<kCapped, true, true>(x, vocab, transform, top1);
  if (weighted) return reduce_row<kCapped, true, false>(x, vocab, transform, top1);
  if (squared) return reduce_row<kCapped, false, true>(x, vocab, transform, top1);
  return reduce_row<kCapped, false, false>(x, vocab, transform, top1);
}

template <typename A>
void store_row(const TokenLogProbsArgs& a, int64_t row, const RowResult<A>& result, A out) {
  const RowSums& sums = result.sums;
  store<A>(a.log_probs, row, sums.log_prob((double(result.y_target) - double(result.y_max)) * double(out)));
  store<A>(a.entropy, row, sums.entropy());
  store<A>(a.sum_squared_probs, row, sums.sum_squared_probs());
  if (a.top1_ids != nullptr) a.top1_ids[row] = result.finite() ? result.top1 : -1;
  if (a.statistics == nullptr) return;
  A* statistics = static_cast<A*>(a.statistics) + row;
  const auto write = [&](A max, A sum, A target, A weighted) {
    statistics[kRowMax * a.layout.rows] = max;
    statistics[kRowSum * a.layout.rows] = sum;
    statistics[kRowTarget * a.layout.rows] = target;
    statistics[kRowWeighted * a.layout.rows] = weighted;
  };
  if (!result.finite()) {
    if (sums.sum == 0.0) return write(-infinity<A>(), A(0), -infinity<A>(), A(0));  // only -inf: may be part of a row
    const A nan = nan_of(A());
    return write(nan, nan, nan, nan);
  }
  // The statistics hold max z rounded, and the sums relative to that.
  const double top = double(result.y_max) * double(out);
  RowSums rounded = sums;
  rounded.rebase(top - double(A(top)));
  write(A(top), A(rounded.sum), A(double(result.y_target) * double(out)), A(rounded.weighted));
}

// Returns whether the row's token id lies inside the vocabulary; the row is NaN if it does not.
template <bool kCapped, typename T>
bool forward_row(const TokenLogProbsArgs& a, int64_t row) {
  using A = typename Arithmetic<T>::type;
  if (!is_live(a.transform, row)) {
    store_row<A>(a, row, {{1.0, 0.0, 0.0}, A(0), A(0), -1}, A(1));
    return true;
  }
  const int64_t id = token_id(a.transform, row);
  if (id >= a.layout.vocab) {
    const double nan = nan_of(double());
    store_row<A>(a, row, {{nan, nan, nan}, A(nan), A(nan), -1}, A(1));
    return false;
  }
  const T* x = static_cast<const T*>(a.logits) + row_offset(a.layout, row);
  const Transform<A> transform = row_transform<A>(a.transform, row);
  RowResult<A> result = reduce_row<kCapped>(x, a.layout.vocab, transform, a.entropy != nullptr, a.sum_squared_probs != nullptr,
                                            a.top1_ids != nullptr);
  result.y_target = transform.template apply<kCapped>(to_arithmetic(x[id]));
  store_row<A>(a, row, result, transform.out);
  return true;
}

// Whether the backward may leave out the exact product. Where that costs nothing, there is one loop instead of two.
template <typename A>
bool is_unit(const Transform<A>& transform) {
  return GK_HAS_FMA == 0 && transform.out == A(1);
}

template <bool kUnit, bool kCapped, typename T, typename A>
void gradient_row(const T* x, int64_t count, const Transform<A>& row_transform, const RowGradient<A>& row_gradient, T* grad) {
  const Transform<A> transform = row_transform;
  const RowGradient<A> gradient = row_gradient;
  const auto store = [&](int64_t i) {
    const A y = transform.template apply<kCapped>(to_arithmetic(x[i]));
    const A u = kUnit ? y - gradient.max : exact_multiply_add(y, transform.out, -gradient.max);
    from_arithmetic(gradient.at(u) * transform.template bend<kCapped>(y), grad[i]);
  };
  int64_t begin = 0;
  for (; begin + kStrip <= count; begin += kStrip) {
    prefetch(reinterpret_cast<const char*>(x + begin) + kBytesAhead, kStrip * int64_t(sizeof(T)));
#pragma omp simd
    for (int64_t k = 0; k < kStrip; ++k) store(begin + k);
  }
#pragma omp simd
  for (int64_t i = begin; i < count; ++i) store(i);
}

template <bool kCapped, typename T>
void backward_row(const TokenLogProbsBackwardArgs& a, int64_t row) {
  using A = typename Arithmetic<T>::type;
  const LogitRows& l = a.layout;
  const T* x = static_cast<const T*>(a.logits) + row_offset(l, row);
  T* grad = static_cast<T*>(a.grad_logits) + row / l.inner * a.grad_outer_stride + row % l.inner * a.grad_inner_stride;
  const A grad_log_prob = a.grad_log_probs == nullptr ? A(0) : static_cast<const A*>(a.grad_log_probs)[row];
  const A grad_entropy = a.grad_entropy == nullptr ? A(0) : static_cast<const A*>(a.grad_entropy)[row];
  const A grad_log_sum_exp = a.grad_log_sum_exp == nullptr ? A(0) : static_cast<const A*>(a.grad_log_sum_exp)[row];
  if (!is_live(a.transform, row) || (grad_log_prob == A(0) && grad_entropy == A(0) && grad_log_sum_exp == A(0))) {
    memset(static_cast<void*>(grad), 0, size_t(l.vocab) * sizeof(T));
    return;
  }
  const A* statistics = static_cast<const A*>(a.statistics) + row;
  const Transform<A> transform = row_transform<A>(a.transform, row);
  const RowGradient<A> gradient =
      RowGradient<A>::make(statistics[kRowMax * l.rows], statistics[kRowSum * l.rows], statistics[kRowWeighted * l.rows],
                           grad_log_prob, grad_entropy, grad_log_sum_exp, transform.slope());
  const int64_t id = token_id(a.transform, row);
  T at_target{};
  if (id < l.vocab) {  // read before the gradient overwrites the logit
    const A y = transform.template apply<kCapped>(to_arithmetic(x[id]));
    const A u = exact_multiply_add(y, transform.out, -gradient.max);
    const A value = gradient.at_target(u, grad_log_prob, grad_entropy, grad_log_sum_exp);
    from_arithmetic(value * transform.template bend<kCapped>(y), at_target);
  }
  if (is_unit(transform)) {
    gradient_row<true, kCapped>(x, l.vocab, transform, gradient, grad);
  } else {
    gradient_row<false, kCapped>(x, l.vocab, transform, gradient, grad);
  }
  if (id < l.vocab) grad[id] = at_target;
}

int threads_for(const LogitRows& l, int threads) {
  const int64_t useful = l.rows * l.vocab / kElementsPerThread;
  return useful < threads ? (useful < 1 ? 1 : int(useful)) : threads;
}

int64_t rows_per_chunk(const LogitRows& l) { return l.vocab >= kElementsPerChunk ? 1 : kElementsPerChunk / l.vocab; }

template <bool kCapped, typename T>
int64_t forward(const TokenLogProbsArgs& a, int threads) {
  int64_t first_bad = -1;
  parallel_rows(a.layout.rows, threads_for(a.layout, threads), rows_per_chunk(a.layout), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (forward_row<kCapped, T>(a, row)) continue;
#pragma omp critical(gk_first_bad_row)
      first_bad = first_bad < 0 || row < first_bad ? row : first_bad;
    }
  });
  return first_bad;
}

template <bool kCapped, typename T>
int64_t backward(const TokenLogProbsBackwardArgs& a, int threads) {
  parallel_rows(a.layout.rows, threads_for(a.layout, threads), rows_per_chunk(a.layout), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) backward_row<kCapped, T>(a, row);
  });
  return -1;
}

template <typename T>
int64_t forward(const TokenLogProbsArgs& a, int threads) {
  return a.transform.softcap > 0.0 ? forward<true, T>(a, threads) : forward<false, T>(a, threads);
}

template <typename T>
int64_t backward(const TokenLogProbsBackwardArgs& a, int threads) {
  return a.transform.softcap > 0.0 ? backward<true, T>(a, threads) : backward<false, T>(a, threads);
}

}  // namespace

int64_t token_log_probs_cpu(const TokenLogProbsArgs& args, int threads) {
  return by_dtype(args.layout.dtype, [&](auto element) { return forward<decltype(element)>(args, threads); });
}

int64_t token_log_probs_backward_cpu(const TokenLogProbsBackwardArgs& args, int threads) {
  return by_dtype(args.layout.dtype, [&](auto element) { return backward<decltype(element)>(args, threads); });
}

}  // namespace GK_ISA
}  // namespace grpo_kernels
