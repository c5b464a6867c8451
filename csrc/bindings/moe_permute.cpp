// Binding of moe_permute.
#include "moe_permute/moe_permute.h"

#include <tuple>

#include "bindings/bindings.h"

namespace grpo_kernels {
namespace {

void check_on_cpu(const char* op, int device) {
  if (device >= 0) throw std::runtime_error(std::string(op) + ": on CUDA this op runs on Triton");
}

int64_t build_permutation(Address topk_ids, bool wide_ids, int64_t slots, int num_experts, int first, int last,
                          int64_t alignment, int64_t rows, int tiles, Address workspace, Address row_id_map, Address inv_map,
                          Address offsets, Address tokens_per_expert, int device, Address stream_or_threads) {
  BuildPermutationArgs args{};
  args.topk_ids = pointer<const void>(topk_ids);
  args.wide_ids = wide_ids;
  args.slots = slots;
  args.num_experts = num_experts;
  args.first = first;
  args.last = last;
  args.alignment = alignment;
  args.rows = rows;
  args.tiles = tiles;
  args.workspace = pointer<int32_t>(workspace);
  args.row_id_map = pointer<int32_t>(row_id_map);
  args.inv_map = pointer<int32_t>(inv_map);
  args.offsets = pointer<int32_t>(offsets);
  args.tokens_per_expert = pointer<int32_t>(tokens_per_expert);
  GK_LAUNCH(build_permutation, args, device, stream_or_threads);
}

// What the moves have in common: the dtype of their rows, numbers of tokens, columns, rows and slots of a token, row_id_map and
// topk_weights.
using Moved = std::tuple<int, int64_t, int64_t, int64_t, int, Address, Address>;

template <typename Args>
Args make_args(const Moved& moved) {
  const auto [dtype, tokens, hidden, rows, top_k, row_id_map, topk_weights] = moved;
  Args args{};
  args.dtype = dtype;
  args.tokens = tokens;
  args.hidden = hidden;
  args.rows = rows;
  args.top_k = top_k;
  args.row_id_map = pointer<const int32_t>(row_id_map);
  args.topk_weights = pointer<const void>(topk_weights);
  return args;
}

int64_t moe_permute(const Moved& moved, Address x, int64_t x_stride, Address inv_map, Address out, int device,
                    Address stream_or_threads) {
  check_on_cpu("moe_permute", device);
  auto args = make_args<MoePermuteArgs>(moved);
  args.x = pointer<const void>(x);
  args.x_stride = x_stride;
  args.inv_map = pointer<const int32_t>(inv_map);
  args.out = pointer<void>(out);
  py::gil_scoped_release release;
  return GK_CALL_CPU(moe_permute, args, int(stream_or_threads));
}

int64_t moe_unpermute(const Moved& moved, Address y, int64_t y_stride, Address out, int device, Address stream_or_threads) {
  check_on_cpu("moe_unpermute", device);
  auto args = make_args<MoeUnpermuteArgs>(moved);
  args.y = pointer<const void>(y);
  args.y_stride = y_stride;
  args.out = pointer<void>(out);
  py::gil_scoped_release release;
  return GK_CALL_CPU(moe_unpermute, args, int(stream_or_threads));
}

int64_t moe_unpermute_backward(const Moved& moved, Address grad, int64_t grad_stride, Address y, int64_t y_stride,
                               Address inv_map, Address grad_y, Address grad_weights, int device, Address stream_or_threads) {
  check_on_cpu("moe_unpermute_backward", device);
  auto args = make_args<MoeUnpermuteBackwardArgs>(moved);
  args.grad = pointer<const void>(grad);
  args.grad_stride = grad_stride;
  args.y = pointer<const void>(y);
  args.y_stride = y_stride;
  args.inv_map = pointer<const int32_t>(inv_map);
  args.grad_y = pointer<void>(grad_y);
  args.grad_weights = pointer<void>(grad_weights);
  py::gil_scoped_release release;
  return GK_CALL_CPU(moe_unpermute_backward, args, int(stream_or_threads));
}

}  // namespace

void bind_moe_permute(py::module_& module) {
  module.def("build_permutation", &build_permutation);
  module.def("moe_permute", &moe_permute);
  module.def("moe_unpermute", &moe_unpermute);
  module.def("moe_unpermute_backward", &moe_unpermute_backward);
}

}  // namespace grpo_kernels
