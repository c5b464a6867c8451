#include "grpo_loss/cuda_records.h"

namespace grpo_kernels {
namespace GK_ISA {
namespace loss_kernels {
namespace {

constexpr int kTokensPerThread = int(kSegment) / kThreads;

__device__ bool given(const GRPOLossArgs& a, int input) { return a.tensors[input].data != nullptr; }

// --- loading -----------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ bool is_inside(const Segment& s, int64_t i) { return s.row >= 0 && i < s.count; }

// Whether a token inside the segment counts.
__device__ __forceinline__ bool is_live(const GRPOLossArgs& a, const Segment& s, int64_t i) {
  const LossTensor& mask = a.tensors[kMask];
  if (mask.data == nullptr) return true;
  if (a.mask_bytes == 1) return *token_address<int8_t>(mask, s.row, s.begin + i) != 0;
  if (a.mask_bytes == 4) return *token_address<int32_t>(mask, s.row, s.begin + i) != 0;
  return *token_address<int64_t>(mask, s.row, s.begin + i) != 0;
}

__device__ __forceinline__ float load(const GRPOLossArgs& a, int input, const Segment& s, int64_t i, float otherwise) {
  return given(a, input) ? *token_address<float>(a.tensors[input], s.row, s.begin + i) : otherwise;
}

// What a token brings along; masked ones bring zeros.
struct Token {
  float log_prob, old, advantage, weight, ref, sampler, entropy, upstream;
  bool live;
};

// The loads do not wait for the mask: what it hides is replaced afterwards.
__device__ __forceinline__ Token load_token(const GRPOLossArgs& a, const Segment& s, int64_t i) {
  Token t{};
  if (!is_inside(s, i)) return t;
  t.live = is_live(a, s, i);
  t.log_prob = load(a, kLogProbs, s, i, 0.0f);
  t.old = load(a, kOldLogProbs, s, i, t.log_prob);
  t.advantage = load(a, kAdvantages, s, i, 0.0f);
  t.weight = load(a, kTokenWeights, s, i, 1.0f);
  t.ref = load(a, kRefLogProbs, s, i, 0.0f);
  t.sampler = load(a, kSamplerLogProbs, s, i, 0.0f);
  t.entropy = load(a, kTokenEntropy, s, i, 0.0f);
  t.upstream = load(a, kUpstream, s, i, 0.0f);
  if (!t.live) t = Token{};
  return t;
}

// --- rows --------------------------------------------------------------------------------------------------------------------

// Sum of value(k) over the segments k of a row, by every warp for itself.
template <typename Value>
__device__ double sum_over_segments(const Segment& s, const Value& value) {
  double sum = 0.0;
  for (int64_t k = threadIdx.x % kWarp; k < s.segments; k += kWarp) sum += value(s.first + k);
  return warp_sum(sum);
}

__device__ double row_sum(const GRPOLossArgs& a, const Segment& s, int which) {
  return sum_over_segments(s, [&](int64_t segment) { return segment_row_sums(a, segment)[which]; });
}

// One block owns a segment of 1024 tokens, four a thread, and writes its five row sums. Bytes a token: 8 and the mask, and 4
// with a sampler.
__global__ void __launch_bounds__(kThreads) row_sums_kernel(const GRPOLossArgs a, const Options o) {
  __shared__ double warp_sums[kWarps][kRowSums];
  const Segment s = segment_at(a.layout, blockIdx.x);
  if (s.row < 0) return;
  const bool sampler = given(a, kSamplerLogProbs);
  double sums[kRowSums] = {};
  for (int k = 0; k < kTokensPerThread; ++k) {
    const int64_t i = k * kThreads + threadIdx.x;
    if (!is_inside(s, i)) break;
    const bool live = is_live(a, s, i);
    const float log_prob = load(a, kLogProbs, s, i, 0.0f);
    const float old = load(a, kOldLogProbs, s, i, log_prob);
    const float sampled = load(a, kSamplerLogProbs, s, i, 0.0f);
    if (!live) continue;
    const float log_ratio = gap(log_prob, old).value;
    const float part = o.surrogate == kGMPO ? clipped_gap(o, load(a, kAdvantages, s, i, 0.0f), log_ratio).value : log_ratio;
    sums[kRowTokens] += 1.0;
    sums[kRowLogRatio] += double(part);
    if (o.corrects_sequences()) sums[kRowSamplerGap] += double(evidence(old, sampled));
    if (o.off_policy_mask) sums[kRowOffPolicy] += double(evidence(sampler ? sampled : old, log_prob));
    if (o.surrogate != kVESPO) continue;
    sums[kRowVESPO] += double(clamp(log_ratio, float(-kLogWeightMax), float(kLogWeightMax)));
    if (o.corrects_tokens()) sums[kRowVESPO] += double(log_sampler_weight(o, evidence(old, sampled)));
  }
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int j = 0; j < kRowSums; ++j) {
    const double sum = warp_sum(sums[j]);
    if (lane == j) warp_sums[warp][j] = sum;
  }
  __syncthreads();
  if (threadIdx.x >= kRowSums) return;
  double total = 0.0;
  for (int w = 0; w < kWarps; ++w) total += warp_sums[w][threadIdx.x];
  segment_row_sums(a, blockIdx.x)[threadIdx.x] = total;
}

// --- the loss ----------------------------------------------------------------------------------------------------------------

// What one launch shares among its threads.
struct Shared {
  RowState<float> row;
  float beta, entropy_coef, threshold;
  bool entropy_mask;
};

__device__ Shared load_shared(const GRPOLossArgs& a, const Options& o, const Segment& s, double& factor) {
  Shared shared{plain_row<float>(), read_number<float>(a.numbers[kKLCoef]), 0.0f, 0.0f, false};
  if (given(a, kTokenEntropy)) shared.entropy_coef = read_number<float>(a.numbers[kEntropyCoef]);
  shared.entropy_mask = a.numbers[kEntropyThreshold].data != nullptr;
  if (shared.entropy_mask) shared.threshold = read_number<float>(a.numbers[kEntropyThreshold]);
  factor = 1.0;
  if (o.needs_row_sums() && s.row >= 0) {
    double sums[kRowSums];
#pragma unroll
    for (int j = 0; j < kRowSums; ++j) sums[j] = row_sum(a, s, j);
    shared.row = row_state(o, sums);
    factor = row_factor(o.reduction, sums[kRowTokens]);
  }
  return shared;
}

// Everything about one token: its outputs are written, and what it is counted for is added.
template <bool kSpecial>
__device__ __forceinline__ void add_token(const GRPOLossArgs& a, const Options& o, const Shared& shared, const Token& t,
                                          float selected, int64_t output, Partial& p) {
  const RowState<float>& row = shared.row;
  Gap<float> log_ratio = gap(t.log_prob, t.old);
  if constexpr (kSpecial) {
    if (o.clamps_log_ratio && !o.sequence_ratio) log_ratio = bounded(o, log_ratio);
    if (o.sequence_ratio && !o.shares_gradient) log_ratio.slope = own_slope(t.log_prob);
  }
  const float ratio = o.sequence_ratio ? row.ratio : fast_exp(log_ratio.value);
  float correction = 1.0f;
  if (given(a, kSamplerLogProbs)) {
    correction = o.corrects_sequences() ? row.sampler_weight : sampler_weight(o, fast_exp(evidence(t.old, t.sampler)));
  }
  const bool kept = t.live && (!shared.entropy_mask || t.entropy >= shared.threshold);
  const PolicyWeight<float> weight =
      policy_weight(o, row.off_policy, kept ? 1.0f : 0.0f, selected, t.advantage, t.weight, correction);
  const PolicyToken<float> token{t.advantage, weight.weight, weight.factor, t.log_prob, t.old, ratio, 0.0f, selected};
  Term<float> policy;
  float clipped = ratio, capped = ratio;
  if constexpr (kSpecial) {
    PolicyToken<float> special = token;
    if (o.bounds_divergence()) {
      special.moved = clipped = divergence(o.surrogate, o, t.advantage, t.log_prob, t.old);
      capped = special.moved == 0.0f ? ratio : 0.0f;
    }
    if (o.surrogate == kGMPO) clipped = log_ratio.value;
    policy = policy_term(o.surrogate, o, row, special);
  } else {
    policy = common_policy_term(o.surrogate, o, row, token);
  }
  Term<float> kl{0.0f, 0.0f, 0.0f};
  if (o.estimator != kNoKL) kl = kl_term(o, kl_estimate(o.estimator, o, t.ref, t.log_prob), t.ref, t.log_prob, ratio);
  Term<float> term = o.estimator == kNoKL ? policy : token_term(policy, kl, shared.beta);
  if (kSpecial && row.held != 0.0f) term.through = 0.0f;
  const float upstream = given(a, kUpstream) ? t.upstream : row.factor;
  const bool bonus = kept && shared.entropy_coef != 0.0f;
  if (a.grad_log_probs != nullptr) {
    const float gradient = token_gradient(term, upstream, !o.shares_gradient, log_ratio.slope);
    static_cast<float*>(a.grad_log_probs)[output] = t.live ? gradient : 0.0f;
  }
  if (a.grad_entropy != nullptr) {
    const float per_token = bonus ? -shared.entropy_coef * upstream : 0.0f;
    const float share = o.reduces_entropy ? upstream : 1.0f;
    const float gradient = o.reduction == kNoReduction ? per_token : (kept ? share : 0.0f);
    static_cast<float*>(a.grad_entropy)[output] = gradient;
  }
  if (a.loss != nullptr && o.reduction == kNoReduction) {
    const float loss = term.value - (bonus ? shared.entropy_coef * t.entropy : 0.0f);
    static_cast<float*>(a.loss)[output] = t.live ? loss : 0.0f;
  }
  if (!t.live) return;
  p.sums[kThrough] += double(upstream * term.through);
  if (a.metrics == nullptr) return;
  const TokenFlags<float> flags = token_flags(o, term.value, t.advantage, clipped, capped);
  p.counts[kTokens] += 1.0f;
  p.sums[kTokenLoss] += double(term.value);
  p.counts[kNonfinite] += flags.nonfinite;
  p.sums[kPolicyLoss] += double(policy.value);
  p.sums[kKL] += double(kl.value);
  p.sums[kEntropy] += double(t.entropy);
  p.sums[kLogRatio] += double(log_ratio.value);
  p.sums[kRatio] += double(ratio);
  p.sums[kRatioSquared] += double(ratio) * double(ratio);
  p.counts[kClipLow] += flags.clip_low;
  p.counts[kClipHigh] += flags.clip_high;
  p.counts[kCapped] += flags.capped + selected;
  p.counts[kOffPolicyDropped] += weight.dropped;
  p.counts[kHighEntropy] += kept ? 1.0f : 0.0f;
  p.sums[kEntropyBonus] += kept ? double(t.entropy) : 0.0;
  p.counts[kZeroAdvantage] += flags.zero_advantage;
  if (o.surrogate == kVESPO) p.sums[kVESPOWeight] += double(t.advantage >= 0.0f ? row.phi_pos : row.phi_neg);
  take_extremes(ratio, p.minima[0], p.maxima[0]);
  if (!given(a, kSamplerLogProbs)) return;
  const SamplerGap<float> sampler = sampler_gap(t.old, t.sampler);
  p.sums[kSamplerWeight] += double(correction);
  p.sums[kSamplerWeightSquared] += double(correction) * double(correction);
  p.counts[kSamplerScored] += sampler.scored;
  p.sums[kSamplerGap] += double(sampler.scored * sampler.size);
  take_extremes(correction, p.minima[kSamplerWeightMin - kRatioMin], p.maxima[kSamplerWeightMax - kRatioMax]);
  float unused = 0.0f;
  if (sampler.scored != 0.0f) take_extremes(sampler.size, unused, p.maxima[kSamplerGapMax - kRatioMax]);
}

// One block owns a segment of 1024 tokens, four a thread, loaded one ahead of the arithmetic. It writes their outputs and one
// record of 32 sums, which the last blocks to finish merge in a fixed order: no second launch, no floating-point atomics. A
// row's statistics come from the launch before, if the options need any. Bytes a token: 4 an input, 1 the mask, 4 an output.
template <bool kSpecial>
__device__ __forceinline__ void loss_of_segment(const GRPOLossArgs& a, const Options& o) {
  const Segment s = segment_at(a.layout, blockIdx.x);
  double factor;
  const Shared shared = load_shared(a, o, s, factor);
  const int64_t output = output_offset(a.layout, s);
  Partial p = empty_partial();
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < s.count; i += kThreads) {
    const Token t = load_token(a, s, i);
    const float selected = kSpecial && t.live ? load(a, kSelection, s, i, 0.0f) : 0.0f;
    add_token<kSpecial>(a, o, shared, t, selected, output + i, p);
  }
  if (a.metrics == nullptr && !o.shares_gradient) return;
  p.sums[kTokenLoss] *= factor;
  if (o.reduces_entropy) p.sums[kEntropyBonus] *= factor;
  const double value = block_record(warp_record(p));
  if (threadIdx.x < kWarp) segment_record(a, blockIdx.x)[threadIdx.x] = value;
  if (a.metrics == nullptr) return;
  if (s.row >= 0 && value > 0.0) {
    uint32_t* counters = row_counters(a, s.row);
    if (threadIdx.x == kTokens) atomicAdd(counters, uint32_t(value));
    if (threadIdx.x == kClipLow) atomicAdd(counters + 1, uint32_t(value));
    if (threadIdx.x == kClipHigh) atomicAdd(counters + 2, uint32_t(value));
  }
  finish(a, o);
}

__global__ void __launch_bounds__(kThreads) loss_kernel(const GRPOLossArgs a, const Options o) { loss_of_segment<false>(a, o); }

// The surrogates of is_special(), which take more registers.
__global__ void __launch_bounds__(kThreads, 1) special_loss_kernel(const GRPOLossArgs a, const Options o) {
  loss_of_segment<true>(a, o);
}

// Where a row's tokens share the derivative of its log-ratio: adds to every gradient of a segment what its row's tokens send
// through the row's log-ratio. Bytes a token: 16 and the mask.
__global__ void __launch_bounds__(kThreads) share_kernel(const GRPOLossArgs a, const Options o) {
  const Segment s = segment_at(a.layout, blockIdx.x);
  if (s.row < 0) return;
  const double through = sum_over_segments(s, [&](int64_t segment) { return segment_record(a, segment)[kThrough]; });
  const float shared = shared_gradient<float>(through, row_sum(a, s, kRowTokens));
  float* grad = static_cast<float*>(a.grad_log_probs) + output_offset(a.layout, s);
  for (int64_t i = threadIdx.x; i < s.count; i += kThreads) {
    const bool live = is_live(a, s, i);
    const float log_prob = load(a, kLogProbs, s, i, 0.0f);
    const float old = load(a, kOldLogProbs, s, i, log_prob);
    const Gap<float> log_ratio = gap(log_prob, old);
    bool moves = live && log_ratio.slope != 0.0f;
    if (o.surrogate == kGMPO) moves = moves && clipped_gap(o, load(a, kAdvantages, s, i, 0.0f), log_ratio.value).slope != 0.0f;
    if (moves) grad[i] += shared;
  }
}

}  // namespace
}  // namespace loss_kernels
}  // namespace GK_ISA

int grpo_loss_cuda(const GRPOLossArgs& a, void* stream) {
  using namespace GK_ISA::loss_kernels;
  const Options o = make_options<float>(a);
  const auto blocks = unsigned(count_segments(a.layout));
  // A memset, not a kernel; a captured graph repeats it with every replay. launch_status() reports its error, too.
  if (a.metrics != nullptr)
    cudaMemsetAsync(a.counters, 0, size_t(count_counters(a.layout)) * sizeof(uint32_t), static_cast<cudaStream_t>(stream));
  if (o.needs_row_sums()) GK_ISA::launch(row_sums_kernel, blocks, kThreads, stream, a, o);
  GK_ISA::launch(is_special(o) ? special_loss_kernel : loss_kernel, blocks, kThreads, stream, a, o);
  if (o.shares_gradient && a.grad_log_probs != nullptr) GK_ISA::launch(share_kernel, blocks, kThreads, stream, a, o);
  return GK_ISA::launch_status();
}

}  // namespace grpo_kernels
