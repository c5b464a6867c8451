// Binding of moe_router.
#include <pybind11/stl.h>

#include <array>

#include "bindings/bindings.h"
#include "moe_router/workspace.h"

namespace grpo_kernels {
namespace {

using Losses = std::array<bool, router::kLosses>;

RouterOptions make_options(int scoring, bool normalize, double scaling, const Losses& losses) {
  RouterOptions options{scoring, normalize, scaling, {}};
  for (size_t i = 0; i < losses.size(); ++i) options.losses[i] = losses[i];
  return options;
}

// Where the counters begin in the workspace of the forward, in doubles.
int64_t sums_size(int64_t tokens, int experts, int64_t sequences, const Losses& losses, bool cuda) {
  return GK_ISA::router_kernels::workspace_size(tokens, experts, sequences, losses.data(), cuda);
}

// How many doubles of workspace the forward needs: one block, because each costs the caller an allocation.
int64_t moe_router_workspace(int64_t tokens, int experts, int64_t sequences, const Losses& losses, bool cuda) {
  const int64_t counters = cuda ? 0 : GK_ISA::router_kernels::counters_size(experts, sequences, losses.data());
  return sums_size(tokens, experts, sequences, losses, cuda) + (counters + 1) / 2;
}

int64_t moe_router(Address logits, int64_t tokens, int64_t row_stride, int experts, int top_k, int dtype, int scoring,
                   bool normalize, double scaling, const Losses& losses, Address cu_seqlens, bool wide, int64_t sequences,
                   int n_group, int topk_group, int group_score, Address bias, Address mask, Address replay, int replay_type,
                   Address workspace, const std::array<Address, 7>& outputs, int device, Address stream_or_threads) {
  MoeRouterArgs args{};
  args.rows = {pointer<const void>(logits), tokens, row_stride, experts, top_k, dtype};
  args.options = make_options(scoring, normalize, scaling, losses);
  args.sequences = {pointer<const void>(cu_seqlens), wide, sequences};
  args.n_group = n_group;
  args.topk_group = topk_group;
  args.group_score = group_score;
  args.bias = pointer<const void>(bias);
  args.mask = pointer<const uint8_t>(mask);
  args.replay = pointer<const void>(replay);
  args.replay_type = replay_type;
  const Scratch memory(workspace, [&] { return moe_router_workspace(tokens, experts, sequences, losses, device >= 0); });
  args.workspace = memory.data();
  args.counters = reinterpret_cast<uint32_t*>(args.workspace + sums_size(tokens, experts, sequences, losses, device >= 0));
  args.topk_weights = pointer<void>(outputs[0]);
  args.topk_ids = pointer<int32_t>(outputs[1]);
  args.per_expert = pointer<int32_t>(outputs[2]);
  args.losses = pointer<void>(outputs[3]);
  args.mismatch = pointer<int32_t>(outputs[4]);
  args.balance = pointer<void>(outputs[5]);
  args.live_tokens = pointer<int32_t>(outputs[6]);
  GK_LAUNCH(moe_router, args, device, stream_or_threads);
}

int64_t moe_router_backward(Address logits, int64_t tokens, int64_t row_stride, int experts, int top_k, int dtype, int scoring,
                            bool normalize, double scaling, const Losses& losses, Address cu_seqlens, bool wide,
                            int64_t sequences, Address topk_weights, Address topk_ids, Address balance, Address live_tokens,
                            Address grad_weights, Address grad_losses, Address grad_logits, int device,
                            Address stream_or_threads) {
  MoeRouterBackwardArgs args{};
  args.rows = {pointer<const void>(logits), tokens, row_stride, experts, top_k, dtype};
  args.options = make_options(scoring, normalize, scaling, losses);
  args.sequences = {pointer<const void>(cu_seqlens), wide, sequences};
  args.topk_weights = pointer<const void>(topk_weights);
  args.topk_ids = pointer<const int32_t>(topk_ids);
  args.balance = pointer<const void>(balance);
  args.live_tokens = pointer<const int32_t>(live_tokens);
  args.grad_weights = pointer<const void>(grad_weights);
  args.grad_losses = pointer<const void>(grad_losses);
  args.grad_logits = pointer<void>(grad_logits);
  GK_LAUNCH(moe_router_backward, args, device, stream_or_threads);
}

}  // namespace

void bind_moe_router(py::module_& module) {
  module.def("moe_router_workspace", &moe_router_workspace);
  module.def("moe_router", &moe_router);
  module.def("moe_router_backward", &moe_router_backward);
}

}  // namespace grpo_kernels
