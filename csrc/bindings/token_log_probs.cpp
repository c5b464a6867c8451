// Binding of token_log_probs.
#include "token_log_probs/token_log_probs.h"

#include "bindings/bindings.h"

namespace grpo_kernels {
namespace {

LogitRows make_logit_rows(int64_t rows, int64_t inner, int64_t outer_stride, int64_t inner_stride, int64_t vocab, int dtype) {
  return {rows, vocab, inner, outer_stride, inner_stride, dtype};
}

TokenTransform make_token_transform(Address token_ids, bool wide_ids, Address mask, Address temperatures,
                                    bool temperature_per_row, double temperature, double logit_scale, double softcap) {
  return {pointer<const void>(token_ids),
          wide_ids,
          pointer<const uint8_t>(mask),
          pointer<const void>(temperatures),
          temperature_per_row,
          temperature,
          logit_scale,
          softcap};
}

int64_t token_log_probs(int64_t rows, int64_t inner, int64_t outer_stride, int64_t inner_stride, int64_t vocab, int dtype,
                        Address token_ids, bool wide_ids, Address mask, Address temperatures, bool temperature_per_row,
                        double temperature, double logit_scale, double softcap, Address logits, Address log_probs,
                        Address entropy, Address sum_squared_probs, Address top1_ids, Address statistics, int device,
                        Address stream_or_threads) {
  if (device >= 0) throw std::runtime_error("token_log_probs: on CUDA this op runs on Triton");
  TokenLogProbsArgs args{};
  args.layout = make_logit_rows(rows, inner, outer_stride, inner_stride, vocab, dtype);
  args.transform =
      make_token_transform(token_ids, wide_ids, mask, temperatures, temperature_per_row, temperature, logit_scale, softcap);
  args.logits = pointer<const void>(logits);
  args.log_probs = pointer<void>(log_probs);
  args.entropy = pointer<void>(entropy);
  args.sum_squared_probs = pointer<void>(sum_squared_probs);
  args.top1_ids = pointer<int64_t>(top1_ids);
  args.statistics = pointer<void>(statistics);
  py::gil_scoped_release release;
  return GK_CALL_CPU(token_log_probs, args, int(stream_or_threads));
}

int64_t token_log_probs_backward(int64_t rows, int64_t inner, int64_t outer_stride, int64_t inner_stride, int64_t vocab,
                                 int dtype, Address token_ids, bool wide_ids, Address mask, Address temperatures,
                                 bool temperature_per_row, double temperature, double logit_scale, double softcap,
                                 Address logits, Address statistics, Address grad_log_probs, Address grad_entropy,
                                 Address grad_log_sum_exp, Address grad_logits, int64_t grad_outer_stride,
                                 int64_t grad_inner_stride, int device, Address stream_or_threads) {
  if (device >= 0) throw std::runtime_error("token_log_probs: on CUDA this op runs on Triton");
  TokenLogProbsBackwardArgs args{};
  args.layout = make_logit_rows(rows, inner, outer_stride, inner_stride, vocab, dtype);
  args.transform =
      make_token_transform(token_ids, wide_ids, mask, temperatures, temperature_per_row, temperature, logit_scale, softcap);
  args.logits = pointer<const void>(logits);
  args.statistics = pointer<const void>(statistics);
  args.grad_log_probs = pointer<const void>(grad_log_probs);
  args.grad_entropy = pointer<const void>(grad_entropy);
  args.grad_log_sum_exp = pointer<const void>(grad_log_sum_exp);
  args.grad_logits = pointer<void>(grad_logits);
  args.grad_outer_stride = grad_outer_stride;
  args.grad_inner_stride = grad_inner_stride;
  py::gil_scoped_release release;
  return GK_CALL_CPU(token_log_probs_backward, args, int(stream_or_threads));
}

}  // namespace

void bind_token_log_probs(py::module_& module) {
  module.def("token_log_probs", &token_log_probs);
  module.def("token_log_probs_backward", &token_log_probs_backward);
}

}  // namespace grpo_kernels
