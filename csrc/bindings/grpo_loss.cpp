// Binding of grpo_loss.
#include "grpo_loss/segments.h"

#include <pybind11/stl.h>

#include <array>

#include "bindings/bindings.h"

namespace grpo_kernels {
namespace {

// How many doubles of workspace and how many counters the loss needs.
std::pair<int64_t, int64_t> grpo_loss_sizes(int64_t batch, int64_t tokens, bool packed) {
  const LossLayout layout{batch, tokens, packed ? &batch : nullptr, true};  // only whether it is packed matters
  return {GK_ISA::loss_kernels::workspace_size(layout), GK_ISA::loss_kernels::count_counters(layout)};
}

int64_t grpo_loss(int64_t batch, int64_t tokens, Address cu_seqlens, bool wide_cu_seqlens, int dtype, int mask_bytes,
                  const std::array<std::array<int64_t, 3>, loss::kLossInputs>& tensors,
                  const std::array<std::pair<Address, double>, loss::kLossNumbers>& numbers, int64_t max_length,
                  const std::array<int, loss::kLossOptions>& options,
                  const std::array<double, loss::kLossParameters>& parameters, Address workspace, Address counters,
                  Address loss, Address grad_log_probs, Address grad_entropy, Address scale, Address metrics, int device,
                  Address stream_or_threads) {
  GRPOLossArgs args{};
  args.layout = {batch, tokens, pointer<const void>(cu_seqlens), wide_cu_seqlens};
  args.dtype = dtype;
  args.mask_bytes = mask_bytes;
  for (size_t i = 0; i < tensors.size(); ++i) {
    args.tensors[i] = {pointer<const void>(Address(tensors[i][0])), tensors[i][1], tensors[i][2]};
  }
  for (size_t i = 0; i < numbers.size(); ++i) args.numbers[i] = {pointer<const void>(numbers[i].first), numbers[i].second};
  for (size_t i = 0; i < options.size(); ++i) args.options[i] = options[i];
  for (size_t i = 0; i < parameters.size(); ++i) args.parameters[i] = parameters[i];
  args.max_length = max_length;
  const Scratch memory(workspace, [&] { return GK_ISA::loss_kernels::workspace_size(args.layout); });
  args.workspace = memory.data();
  args.counters = pointer<uint32_t>(counters);
  args.loss = pointer<void>(loss);
  args.grad_log_probs = pointer<void>(grad_log_probs);
  args.grad_entropy = pointer<void>(grad_entropy);
  args.scale = pointer<void>(scale);
  args.metrics = pointer<float>(metrics);
  GK_LAUNCH(grpo_loss, args, device, stream_or_threads);
}

}  // namespace

void bind_grpo_loss(py::module_& module) {
  module.def("grpo_loss_sizes", &grpo_loss_sizes);
  module.def("grpo_loss", &grpo_loss);
}

}  // namespace grpo_kernels
