// Binding of token_log_probs.
#include "token_log_probs/token_log_probs.h"

#include <tuple>

#include "bindings/bindings.h"

namespace grpo_kernels {
namespace {

// Where the rows of the logits lie, in elements: row r at (r / inner) * outer_stride + (r % inner) * inner_stride.
using Rows = std::tuple<int64_t, int64_t, int64_t, int64_t>;  // rows, inner, outer_stride, inner_stride

LogitRows make_logit_rows(const Rows& rows, const TensorArg& logits) {
  const auto [number, inner, outer_stride, inner_stride] = rows;
  return {number, logits.size(-1), inner, outer_stride, inner_stride, logits.dtype()};
}

TokenTransform make_token_transform(TensorArg& token_ids, TensorArg& mask, TensorArg& temperatures, double temperature,
                                    double logit_scale, double softcap) {
  return {token_ids.dense().data<const void>(),
          token_ids.wide(),
          mask.dense().data<const uint8_t>(),
          temperatures.dense().data<const void>(),
          temperatures.ndim() > 0,
          temperature,
          logit_scale,
          softcap};
}

int64_t token_log_probs(TensorArg& logits, const Rows& rows, TensorArg& token_ids, TensorArg& mask, TensorArg& temperatures,
                        double temperature, double logit_scale, double softcap, TensorArg& log_probs, TensorArg& entropy,
                        TensorArg& sum_squared_probs, TensorArg& top1_ids, TensorArg& statistics, int device,
                        Address stream_or_threads) {
  if (device >= 0) throw std::runtime_error("token_log_probs: on CUDA this op runs on Triton");
  TokenLogProbsArgs args{};
  args.layout = make_logit_rows(rows, logits);
  args.transform = make_token_transform(token_ids, mask, temperatures, temperature, logit_scale, softcap);
  args.logits = logits.data<const void>();
  args.log_probs = log_probs.data<void>();
  args.entropy = entropy.data<void>();
  args.sum_squared_probs = sum_squared_probs.data<void>();
  args.top1_ids = top1_ids.data<int64_t>();
  args.statistics = statistics.data<void>();
  py::gil_scoped_release release;
  return GK_CALL_CPU(token_log_probs, args, int(stream_or_threads));
}

int64_t token_log_probs_backward(TensorArg& logits, const Rows& rows, TensorArg& token_ids, TensorArg& mask,
                                 TensorArg& temperatures, double temperature, double logit_scale, double softcap,
                                 TensorArg& statistics, TensorArg& grad_log_probs, TensorArg& grad_entropy,
                                 TensorArg& grad_log_sum_exp, TensorArg& grad_logits, int64_t grad_outer_stride,
                                 int64_t grad_inner_stride, int device, Address stream_or_threads) {
  if (device >= 0) throw std::runtime_error("token_log_probs: on CUDA this op runs on Triton");
  TokenLogProbsBackwardArgs args{};
  args.layout = make_logit_rows(rows, logits);
  args.transform = make_token_transform(token_ids, mask, temperatures, temperature, logit_scale, softcap);
  args.logits = logits.data<const void>();
  args.statistics = statistics.dense().data<const void>();
  args.grad_log_probs = grad_log_probs.dense().data<const void>();
  args.grad_entropy = grad_entropy.dense().data<const void>();
  args.grad_log_sum_exp = grad_log_sum_exp.dense().data<const void>();
  args.grad_logits = grad_logits.data<void>();
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
