// The factor that all gradients have. On the CPU the mask tells it before the main pass, which can so write them as they are
// returned.
#pragma once

#include "grpo_loss/records.h"

namespace grpo_kernels {
namespace GK_ISA {
namespace loss_kernels {

template <typename Integer>
int64_t count_nonzero(const LossTensor& mask, const Segment& s) {
  const Integer* data = token_address<Integer>(mask, s.row, s.begin);
  int16_t live = 0;  // of 1024 at most
#pragma omp simd reduction(+ : live)
  for (int64_t i = 0; i < s.count; ++i) live += data[i] != 0 ? 1 : 0;
  return live;
}

inline int64_t count_live_tokens(const GRPOLossArgs& a, const Segment& s) {
  const LossTensor& mask = a.tensors[kMask];
  if (mask.data == nullptr) return s.count;
  if (a.mask_bytes == 1) return count_nonzero<int8_t>(mask, s);
  return a.mask_bytes == 4 ? count_nonzero<int32_t>(mask, s) : count_nonzero<int64_t>(mask, s);
}

// The factor of the sum of all token losses.
template <typename T>
double gradient_scale(const GRPOLossArgs& a, const LossOptions<T>& o) {
  if (o.reduction == kNoReduction || (a.grad_log_probs == nullptr && a.grad_entropy == nullptr)) return 1.0;
  const double num_items = double(read_number<T>(a.numbers[kNumItems]));
  double tokens = 0.0, sequences = 0.0;
  for (int64_t row = 0; row < a.layout.batch && (o.reduction == kTokenMean || o.skips_empty) && !(num_items > 0.0); ++row) {
    const Segment first = first_segment(a.layout, row);
    int64_t live = 0;
    for (int64_t k = 0; k < first.segments; ++k) live += count_live_tokens(a, segment_at(a.layout, first.first + k));
    tokens += double(live);
    sequences += live > 0 ? 1.0 : 0.0;
  }
  return loss_scale(a, o.reduction, tokens, o.skips_empty ? sequences : double(a.layout.batch), num_items);
}

// Writes what is left to multiply the gradients by.
template <typename T>
void write_remaining_scale(const GRPOLossArgs& a, const LossOptions<T>& o) {
  T* scale = static_cast<T*>(a.scale);
  const T coef = read_number<T>(a.numbers[kEntropyCoef]);
  if (o.reduces_entropy && scale[1] != T(0)) scale[1] = -coef;
  scale[0] = T(1);
}

}  // namespace loss_kernels
}  // namespace GK_ISA
}  // namespace grpo_kernels
