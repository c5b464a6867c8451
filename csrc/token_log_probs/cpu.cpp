// Forward: each row is read once, in blocks of 2048 that are transformed into a buffer in the first-level cache; the
// maximum of a block first, then its sums. Backward: each row is read once and its gradient written, over the logits if
// wished.
//
// The sums run over the aligned buffer and never over the caller's memory, so neither addresses nor other rows decide
// their order.

#include "common/cpu_dtype.h"
#include "common/parallel.h"
#include "token_log_probs/formula.h"

namespace grpo_kernels {
namespace GK_ISA {
namespace {

constexpr int64_t kBlock = 2048;
#if defined(__AVX512F__)
constexpr int64_t kStrip = 1024;  // the sum of u e^u runs in float over one strip, 64 terms to a lane
#elif defined(__AVX2__)
constexpr int64_t kStrip = 512;
#else
constexpr int64_t kStrip = 256;
#endif
constexpr int64_t kPadding = 64;               // a row's last strip is cut to a multiple of it: small vocabularies stay cheap
constexpr int64_t kElementsPerChunk = 32768;   // per task
constexpr int64_t kElementsPerThread = 65536;  // below that a second thread costs more than it brings

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

// The block's y, padded with -inf to a multiple of kPadding. Returns its maximum, which passes over NaN.
template <bool kCapped, typename T, typename A>
A load_block(const T* x, int64_t count, const Transform<A>& transform, A* y) {
  A largest = -infinity<A>();
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < count; ++i) {
    const A value = transform.template apply<kCapped>(to_arithmetic(x[i]));
    y[i] = value;
    largest = largest < value ? value : largest;
  }
  for (int64_t i = count; i % kPadding != 0; ++i) y[i] = -infinity<A>();
  return largest;
}

// Sums over 2 * half elements, half <= kStrip / 2. Two terms are added in the arithmetic type before the sum, in double, takes
// them: the conversion is dear.
template <bool kWeighted, bool kSquared, typename A>
inline void add_strip(const A* y, int64_t half, A y_max, A out, RowSums& sums) {
  A weighted = 0;
  double sum = 0.0, squared = 0.0;
#pragma omp simd reduction(+ : sum, weighted, squared) aligned(y : 64)
  for (int64_t i = 0; i < half; ++i) {
    const A u0 = clamp_exponent((y[i] - y_max) * out);
    const A u1 = clamp_exponent((y[i + half] - y_max) * out);
    const A e0 = exp_clamped(u0);
    const A e1 = exp_clamped(u1);
    sum += double(e0 + e1);
    if (kWeighted) weighted += multiply_add(e0, u0, e1 * u1);
    if (kSquared) squared += double(multiply_add(e0, e0, e1 * e1));
  }
  sums.sum += sum;
  sums.weighted += double(weighted);
  sums.squared += squared;
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
    int64_t i = 0;
    for (; i + kStrip <= count; i += kStrip) {
      add_strip<kWeighted, kSquared>(y + i, kStrip / 2, reference, transform.out, row.sums);
    }
    const int64_t rest = (count - i + kPadding - 1) / kPadding * kPadding;
    if (rest > 0) add_strip<kWeighted, kSquared>(y + i, rest / 2, reference, transform.out, row.sums);
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
void gradient_row(const T* x, int64_t count, const Transform<A>& transform, const RowGradient<A>& gradient, T* grad) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const A y = transform.template apply<kCapped>(to_arithmetic(x[i]));
    const A u = kUnit ? y - gradient.max : exact_multiply_add(y, transform.out, -gradient.max);
    from_arithmetic(gradient.at(u) * transform.template bend<kCapped>(y), grad[i]);
  }
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
