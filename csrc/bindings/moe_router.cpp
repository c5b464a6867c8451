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

// The kernels stride over rows and take the last axis as it lies.
RouterRows make_rows(TensorArg& logits, int top_k) {
  logits.dense_rows();
  return {logits.data<const void>(), logits.size(0), logits.stride(0), int(logits.size(1)), top_k, logits.dtype()};
}

RouterSequences make_sequences(TensorArg& cu_seqlens) {
  if (!cu_seqlens.given()) return {nullptr, false, 1};
  return {cu_seqlens.dense().data<const void>(), cu_seqlens.wide(), cu_seqlens.size(0) - 1};
}

int replay_type(const TensorArg& replay) {
  if (!replay.is_signed()) return router::kUint8;
  const int bytes = replay.bytes();
  return bytes == 1 ? router::kInt8 : bytes == 2 ? router::kInt16 : bytes == 4 ? router::kInt32 : router::kInt64;
}

int64_t moe_router(TensorArg& logits, TensorArg& bias, TensorArg& mask, TensorArg& replay, TensorArg& cu_seqlens, int top_k,
                   int scoring, bool normalize, double scaling, const Losses& losses, int n_group, int topk_group,
                   int group_score, TensorArg& workspace, TensorArg& topk_weights, TensorArg& topk_ids,
                   TensorArg& tokens_per_expert, TensorArg& loss_sums, TensorArg& mismatch, TensorArg& balance,
                   TensorArg& live_tokens, int device, Address stream_or_threads) {
  MoeRouterArgs args{};
  args.rows = make_rows(logits, top_k);
  args.options = make_options(scoring, normalize, scaling, losses);
  args.sequences = make_sequences(cu_seqlens);
  args.n_group = n_group;
  args.topk_group = topk_group;
  args.group_score = group_score;
  args.bias = bias.dense().data<const void>();
  args.mask = mask.dense().data<const uint8_t>();
  args.replay = replay.dense().data<const void>();
  args.replay_type = replay_type(replay);
  const int64_t tokens = logits.size(0), sequences = args.sequences.count;
  const int experts = int(logits.size(1));
  const Scratch memory(workspace.data<double>(),
                       [&] { return moe_router_workspace(tokens, experts, sequences, losses, device >= 0); });
  args.workspace = memory.data();
  args.counters = reinterpret_cast<uint32_t*>(args.workspace + sums_size(tokens, experts, sequences, losses, device >= 0));
  args.topk_weights = topk_weights.data<void>();
  args.topk_ids = topk_ids.data<int32_t>();
  args.per_expert = tokens_per_expert.data<int32_t>();
  args.losses = loss_sums.data<void>();
  args.mismatch = mismatch.data<int32_t>();
  args.balance = balance.data<void>();
  args.live_tokens = live_tokens.data<int32_t>();
  GK_LAUNCH(moe_router, args, device, stream_or_threads);
}

int64_t moe_router_backward(TensorArg& logits, TensorArg& topk_weights, TensorArg& topk_ids, TensorArg& cu_seqlens,
                            TensorArg& balance, TensorArg& live_tokens, TensorArg& grad_weights, TensorArg& grad_losses,
                            TensorArg& grad_logits, int scoring, bool normalize, double scaling, const Losses& losses,
                            int device, Address stream_or_threads) {
  MoeRouterBackwardArgs args{};
  args.rows = make_rows(logits, int(topk_ids.size(1)));
  args.options = make_options(scoring, normalize, scaling, losses);
  args.sequences = make_sequences(cu_seqlens);
  args.topk_weights = topk_weights.dense().data<const void>();
  args.topk_ids = topk_ids.dense().data<const int32_t>();
  args.balance = balance.data<const void>();
  args.live_tokens = live_tokens.data<const int32_t>();
  args.grad_weights = grad_weights.dense().data<const void>();
  args.grad_losses = grad_losses.dense().data<const void>();
  args.grad_logits = grad_logits.data<void>();
  GK_LAUNCH(moe_router_backward, args, device, stream_or_threads);
}

}  // namespace

void bind_moe_router(py::module_& module) {
  module.def("moe_router_workspace", &moe_router_workspace);
  module.def("moe_router", &moe_router);
  module.def("moe_router_backward", &moe_router_backward);
}

}  // namespace grpo_kernels
