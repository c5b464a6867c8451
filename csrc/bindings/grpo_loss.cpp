// Binding of grpo_loss.
#include "grpo_loss/segments.h"

#include <pybind11/stl.h>

#include <iterator>

#include "bindings/bindings.h"

namespace grpo_kernels {
namespace {

// How many doubles of workspace and how many counters the loss needs.
std::pair<int64_t, int64_t> grpo_loss_sizes(int64_t batch, int64_t tokens, bool packed) {
  const LossLayout layout{batch, tokens, packed ? &batch : nullptr, true};  // only whether it is packed matters
  return {GK_ISA::loss_kernels::workspace_size(layout), GK_ISA::loss_kernels::count_counters(layout)};
}

// The kernels stride over rows and take the last axis as it lies.
LossTensor place(TensorArg& value, const TensorArg& log_probs) {
  if (!value.given()) return {};
  value.dense_rows();
  if (!value.has_shape_of(log_probs)) return {value.data<const void>(), value.stride(0), 0};
  return {value.data<const void>(), value.ndim() == 2 ? value.stride(0) : 0, 1};
}

int64_t grpo_loss(TensorArg& log_probs, TensorArg& old_log_probs, TensorArg& advantages, TensorArg& mask,
                  TensorArg& ref_log_probs, TensorArg& sampler_log_probs, TensorArg& token_weights, TensorArg& entropy,
                  TensorArg& entropy_threshold, TensorArg& selection, TensorArg& cu_seqlens, TensorArg& upstream,
                  TensorArg& kl_coef_tensor, double kl_coef, TensorArg& entropy_coef_tensor, double entropy_coef,
                  TensorArg& num_items_tensor, double num_items, int64_t max_length, py::handle options, py::handle parameters,
                  TensorArg& workspace, TensorArg& counters, TensorArg& loss, TensorArg& grad_log_probs,
                  TensorArg& grad_entropy, TensorArg& scale, TensorArg& metrics, int device, Address stream_or_threads) {
  GRPOLossArgs args{};
  const int64_t batch = cu_seqlens.given() ? cu_seqlens.size(0) - 1 : log_probs.size(0);
  args.layout = {batch, log_probs.size(-1), cu_seqlens.dense().data<const void>(), cu_seqlens.wide()};
  args.dtype = log_probs.dtype();
  args.mask_bytes = mask.bytes();
  TensorArg* const tensors[] = {&log_probs,         &old_log_probs, &advantages, &mask,      &ref_log_probs,
                                &sampler_log_probs, &token_weights, &entropy,    &selection, &upstream};
  static_assert(std::size(tensors) == loss::kLossInputs);
  for (size_t i = 0; i < std::size(tensors); ++i) args.tensors[i] = place(*tensors[i], log_probs);
  args.numbers[loss::kKLCoef] = {kl_coef_tensor.data<const void>(), kl_coef};
  args.numbers[loss::kEntropyCoef] = {entropy_coef_tensor.data<const void>(), entropy_coef};
  args.numbers[loss::kNumItems] = {num_items_tensor.data<const void>(), num_items};
  args.numbers[loss::kEntropyThreshold] = {entropy_threshold.data<const void>(), 0.0};
  args.max_length = max_length;
  read_numbers(options, args.options);
  read_numbers(parameters, args.parameters);
  const Scratch memory(workspace.data<double>(), [&] { return GK_ISA::loss_kernels::workspace_size(args.layout); });
  args.workspace = memory.data();
  args.counters = counters.data<uint32_t>();
  args.loss = loss.data<void>();
  args.grad_log_probs = grad_log_probs.data<void>();
  args.grad_entropy = grad_entropy.data<void>();
  args.scale = scale.data<void>();
  args.metrics = metrics.data<float>();
  GK_LAUNCH(grpo_loss, args, device, stream_or_threads);
}

}  // namespace

void bind_grpo_loss(py::module_& module) {
  module.def("grpo_loss_sizes", &grpo_loss_sizes);
  module.def("grpo_loss", &grpo_loss);
}

}  // namespace grpo_kernels
