// Binding of verify_draft.
#include "speculative_sampling/speculative_sampling.h"

#include "bindings/bindings.h"
#include "speculative_sampling/workspace.h"

namespace grpo_kernels {
namespace {

using Rows = std::tuple<Address, int64_t, int64_t>;  // address, batch stride, row stride

LogitRowsOfDrafts make_rows(const Rows& rows) {
  return {pointer<const void>(std::get<0>(rows)), std::get<1>(rows), std::get<2>(rows)};
}

// In bytes, for one thread.
int64_t verify_draft_workspace(int64_t drafts, int64_t vocab, int64_t element_size, bool filters) {
  return GK_ISA::workspace_bytes(drafts, vocab, element_size, filters);
}

int64_t verify_draft(int64_t batch, int64_t drafts, int64_t vocab, int dtype, int mode, const Rows& target, const Rows& draft,
                     Address draft_ids, bool wide_ids, Address draft_lengths, Address temperatures, Address top_k,
                     Address top_p, Address seeds, Address offsets, Address workspace, int64_t workspace_stride,
                     Address token_ids, Address num_accepted, Address log_probs, int device, Address stream_or_threads) {
  if (device >= 0) throw std::runtime_error("verify_draft: on CUDA this op runs on Triton");
  VerifyDraftArgs args{};
  args.batch = batch;
  args.drafts = drafts;
  args.vocab = vocab;
  args.dtype = dtype;
  args.mode = mode;
  args.target = make_rows(target);
  args.draft = make_rows(draft);
  args.draft_ids = pointer<const void>(draft_ids);
  args.wide_ids = wide_ids;
  args.draft_lengths = pointer<const int64_t>(draft_lengths);
  args.temperatures = pointer<const void>(temperatures);
  args.top_k = pointer<const int64_t>(top_k);
  args.top_p = pointer<const void>(top_p);
  args.seeds = pointer<const int64_t>(seeds);
  args.offsets = pointer<const int64_t>(offsets);
  args.workspace = pointer<void>(workspace);
  args.workspace_stride = workspace_stride;
  args.token_ids = pointer<int64_t>(token_ids);
  args.num_accepted = pointer<int64_t>(num_accepted);
  args.log_probs = pointer<void>(log_probs);
  py::gil_scoped_release release;
  return GK_CALL_CPU(verify_draft, args, int(stream_or_threads));
}

}  // namespace

void bind_speculative_sampling(py::module_& module) {
  module.def("verify_draft", &verify_draft);
  module.def("verify_draft_workspace", &verify_draft_workspace);
}

}  // namespace grpo_kernels
