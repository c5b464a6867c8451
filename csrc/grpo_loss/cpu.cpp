// A thread takes a segment at a time, in blocks of 256 tokens that stay in the first-level cache through all stages. Statistics
// of rows, where the options need any, take a pass of their own before, and the sequence-level gradient takes one after: over a
// row at a time where there are enough of them, else over all segments. Plain losses have shorter ways: cpu_tame.h takes a
// segment in whole, cpu_rows.h a row whose tokens all have the same loss.

#include "common/parallel.h"
#include "grpo_loss/cpu_rows.h"
#include "grpo_loss/cpu_tame.h"

namespace grpo_kernels {
namespace GK_ISA {
namespace loss_kernels {
namespace {

constexpr int64_t kSegmentsPerChunk = 8;
constexpr int64_t kTokensPerThread = 8192;  // below that a second thread costs more than it brings
constexpr int64_t kRowsPerThread = 4;       // enough for rows of unequal lengths to even out

// --- segments ----------------------------------------------------------------------------------------------------------------

template <typename T>
void sum_segment(const Problem<T>& p, int64_t index) {
  const Segment s = segment_at(p.a.layout, index);
  const LossOptions<T> o = p.o;
  const bool sampler = p.given(kSamplerLogProbs);
  const bool reads_log_probs = o.sequence_ratio || o.corrects_sequences() || o.off_policy_mask || o.surrogate == kVESPO;
  double* sums = segment_row_sums(p.a, index);
  for (int i = 0; i < kRowSums; ++i) sums[i] = 0.0;
  Block<T> b;
  const auto log_ratio = [&](int64_t i) { return gap(b.log_prob[i], b.old[i]).value; };
  const auto clipped_log_ratio = [&](int64_t i) { return clipped_gap(o, b.advantage[i], log_ratio(i)).value; };
  const auto bounded_log_ratio = [&](int64_t i) { return clamp(log_ratio(i), T(-kLogWeightMax), T(kLogWeightMax)); };
  const auto sampler_evidence = [&](int64_t i) { return evidence(b.old[i], b.sampler[i]); };
  const auto log_weight = [&](int64_t i) { return log_sampler_weight(o, sampler_evidence(i)); };
  const auto drift = [&](int64_t i) { return evidence(sampler ? b.sampler[i] : b.old[i], b.log_prob[i]); };
  for (int64_t done = 0; done < s.count; done += kBlock) {
    const int64_t count = s.count - done < kBlock ? s.count - done : kBlock;
    if (!load_live(p.a, s, s.begin + done, count, b.live)) continue;
    const int64_t whole = padded(count);
    sums[kRowTokens] += sum_terms(b.live, whole, [&](int64_t) { return T(1); });
    if (!reads_log_probs) continue;
    load_ratio_inputs(p, s, s.begin + done, count, b);
    if (o.surrogate == kGMPO) {
      load(p.a.tensors[kAdvantages], s, s.begin + done, count, b.live, b.advantage);
      sums[kRowLogRatio] += sum_terms(b.live, whole, clipped_log_ratio);
    } else if (o.sequence_ratio) {
      sums[kRowLogRatio] += sum_terms(b.live, whole, log_ratio);
    }
    if (o.corrects_sequences()) sums[kRowSamplerGap] += sum_terms(b.live, whole, sampler_evidence);
    if (o.off_policy_mask) sums[kRowOffPolicy] += sum_terms(b.live, whole, drift);
    if (o.surrogate == kVESPO) sums[kRowVESPO] += sum_terms(b.live, whole, bounded_log_ratio);
    if (o.surrogate == kVESPO && o.corrects_tokens()) sums[kRowVESPO] += sum_terms(b.live, whole, log_weight);
  }
}

template <typename T>
void loss_segment(const Problem<T>& p, int64_t index) {
  const Segment s = segment_at(p.a.layout, index);
  double* record = segment_record(p.a, index);
  for (int slot = 0; slot < kRecord; ++slot) record[slot] = empty_slot(slot);
  RowState<T> row = plain_row<T>();
  double factor = 1.0;
  if (p.o.needs_row_sums() && s.row >= 0) {
    const double* sums = segment_row_sums(p.a, s.first);
    row = row_state(p.o, sums);
    factor = row_factor(p.o.reduction, sums[kRowTokens]);
  }
  row.factor = T(factor * p.scale);
  if (may_be_tame(p) && s.row >= 0 && s.count > 0 && tame_segment(p, s, row.factor, record)) {
    record[kTokenLoss] *= factor;
    return;
  }
  Block<T> b;
  for (int64_t done = 0; done < s.count; done += kBlock) {
    const int64_t begin = s.begin + done, offset = output_offset(p.a.layout, s) + done;
    const int64_t count = s.count - done < kBlock ? s.count - done : kBlock, whole = padded(count);
    if (!load_live(p.a, s, begin, count, b.live)) {
      clear_outputs(p, offset, count);
      continue;
    }
    load_ratio_inputs(p, s, begin, count, b);
    load(p.a.tensors[kAdvantages], s, begin, count, b.live, b.advantage);
    if (p.given(kTokenEntropy)) load(p.a.tensors[kTokenEntropy], s, begin, count, b.live, b.entropy);
    const auto load_or = [&](int input, T otherwise, T* out) {
      if (p.given(input)) return load(p.a.tensors[input], s, begin, count, b.live, out);
      for (int64_t i = 0; i < whole; ++i) out[i] = otherwise;
    };
    if (p.given(kSelection)) load(p.a.tensors[kSelection], s, begin, count, b.live, b.selected);
    load_or(kTokenWeights, T(1), b.weight);
    load_or(kUpstream, row.factor, b.upstream);
    compute_ratio(p.o, row, whole, b);
    if (p.given(kSamplerLogProbs)) compute_sampler(p.o, row, whole, b);
    compute_weight(p, row, whole, b);
    compute_policy(p.o, row, whole, b);
    if (p.given(kRefLogProbs)) {
      load(p.a.tensors[kRefLogProbs], s, begin, count, b.live, b.ref);
      compute_kl(p.o, whole, b);
    }
    combine(p, whole, b);
    if (row.held != T(0)) memset(b.through, 0, sizeof(b.through));
    store_outputs(p, offset, count, b);
    if (p.a.metrics != nullptr) add_metrics(p, whole, b, record);
    if (p.o.shares_gradient) {
      record[kThrough] += sum_terms(b.live, whole, [&](int64_t i) { return b.upstream[i] * b.through[i]; });
    }
  }
  record[kTokenLoss] *= factor;
  if (p.o.reduces_entropy) record[kEntropyBonus] *= factor;
}

// Adds what the row's tokens send through its log-ratio.
template <typename T>
void share_segment(const Problem<T>& p, int64_t index) {
  const Segment s = segment_at(p.a.layout, index);
  if (s.row < 0) return;
  const T shared = T(segment_row_sums(p.a, s.first)[kRowLogRatio]);
  T* grad = static_cast<T*>(p.a.grad_log_probs) + output_offset(p.a.layout, s);
  const LossOptions<T> o = p.o;
  Block<T> b;
  for (int64_t done = 0; done < s.count; done += kBlock) {
    const int64_t count = s.count - done < kBlock ? s.count - done : kBlock;
    if (!load_live(p.a, s, s.begin + done, count, b.live)) continue;
    load_ratio_inputs(p, s, s.begin + done, count, b);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) b.slope[i] = b.live[i] != T(0) ? gap(b.log_prob[i], b.old[i]).slope : T(0);
    if (o.surrogate == kGMPO) {
      load(p.a.tensors[kAdvantages], s, s.begin + done, count, b.live, b.advantage);
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        b.slope[i] *= clipped_gap(o, b.advantage[i], gap(b.log_prob[i], b.old[i]).value).slope;
      }
    }
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) grad[done + i] += b.slope[i] != T(0) ? shared : T(0);
  }
}

// --- rows --------------------------------------------------------------------------------------------------------------------

// Leaves the sums of a row with its first segment.
void merge_row_sums(const GRPOLossArgs& a, int64_t row) {
  const Segment s = first_segment(a.layout, row);
  double* sums = segment_row_sums(a, s.first);
  for (int64_t k = 1; k < s.segments; ++k) {
    for (int i = 0; i < kRowSums; ++i) sums[i] += segment_row_sums(a, s.first + k)[i];
  }
}

template <typename T>
void merge_through(const GRPOLossArgs& a, int64_t row) {
  const Segment s = first_segment(a.layout, row);
  double through = 0.0;
  for (int64_t k = 0; k < s.segments; ++k) through += segment_record(a, s.first + k)[kThrough];
  double* sums = segment_row_sums(a, s.first);
  sums[kRowLogRatio] = double(shared_gradient<T>(through, sums[kRowTokens]));
}

template <typename T>
using SegmentBody = void (*)(const Problem<T>&, int64_t);

// All passes over a row of a padded layout.
template <typename T>
void row_at_once(const Problem<T>& p, int64_t row, SegmentBody<T> body, bool shares) {
  const Segment s = first_segment(p.a.layout, row);
  for (int64_t k = 0; k < s.segments; ++k) sum_segment(p, s.first + k);
  merge_row_sums(p.a, row);
  for (int64_t k = 0; k < s.segments; ++k) body(p, s.first + k);
  if (!shares) return;
  merge_through<T>(p.a, row);
  for (int64_t k = 0; k < s.segments; ++k) share_segment(p, s.first + k);
}

template <typename T>
void merge_records(const GRPOLossArgs& a, const LossOptions<T>& o) {
  double totals[kRecord];
  for (int slot = 0; slot < kRecord; ++slot) totals[slot] = empty_slot(slot);
  for (int64_t row = 0; row < a.layout.batch; ++row) {
    const Segment s = first_segment(a.layout, row);
    double tokens = 0.0, clip_low = 0.0, clip_high = 0.0;
    for (int64_t k = 0; k < s.segments; ++k) {
      const double* record = segment_record(a, s.first + k);
      for (int slot = 0; slot < kRecord; ++slot) totals[slot] = merge_slot(slot, totals[slot], record[slot]);
      tokens += record[kTokens];
      clip_low += record[kClipLow];
      clip_high += record[kClipHigh];
    }
    for (int slot = 0; slot < kRecord; ++slot) {
      totals[slot] = merge_slot(slot, totals[slot], row_slot(slot, tokens, clip_low, clip_high));
    }
  }
  write_results<T>(a, o, totals);
  if (o.reduction != kNoReduction) write_remaining_scale(a, o);
}

// The first packed row whose bounds are not in order or not inside the tensors, or -1.
int64_t first_bad_row(const LossLayout& l) {
  for (int64_t row = 0; row < l.batch && l.cu_seqlens != nullptr; ++row) {
    const int64_t start = cu_seqlen(l, row), end = cu_seqlen(l, row + 1);
    if (start < 0 || end < start || end > l.tokens) return row;
  }
  return -1;
}

template <typename T>
int64_t run(const GRPOLossArgs& a, int threads) {
  const int64_t bad = first_bad_row(a.layout);
  if (bad >= 0) return bad;
  const Problem<T> p = make_problem<T>(a);
  const int64_t segments = count_segments(a.layout);
  const int64_t rows = a.layout.cu_seqlens == nullptr ? a.layout.batch : 1;
  const int64_t useful = rows * a.layout.tokens / kTokensPerThread;
  const int team = useful < threads ? (useful < 1 ? 1 : int(useful)) : threads;
  const auto for_segments = [&](SegmentBody<T> body) {
    parallel_rows(segments, team, kSegmentsPerChunk, [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) body(p, index);
    });
  };
  const bool uniform = rows_are_uniform(p), shares = p.o.shares_gradient && !uniform && a.grad_log_probs != nullptr;
  const SegmentBody<T> body = uniform ? &uniform_segment<T> : &loss_segment<T>;
  if (!p.o.needs_row_sums()) {
    for_segments(body);
  } else if (a.layout.cu_seqlens == nullptr && a.layout.batch >= kRowsPerThread * team) {
    // A row at a time: what its passes read again is still in the cache.
    parallel_rows(a.layout.batch, team, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) row_at_once(p, row, body, shares);
    });
  } else {
    for_segments(&sum_segment<T>);
    for (int64_t row = 0; row < a.layout.batch; ++row) merge_row_sums(a, row);
    for_segments(body);
    for (int64_t row = 0; row < a.layout.batch && shares; ++row) merge_through<T>(a, row);
    if (shares) for_segments(&share_segment<T>);
  }
  if (a.metrics != nullptr) merge_records<T>(a, p.o);
  return -1;
}

}  // namespace
}  // namespace loss_kernels

int64_t grpo_loss_cpu(const GRPOLossArgs& args, int threads) {
  return args.dtype == kFloat64 ? loss_kernels::run<double>(args, threads) : loss_kernels::run<float>(args, threads);
}

}  // namespace GK_ISA
}  // namespace grpo_kernels
