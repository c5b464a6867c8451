// Binding of the activation of moe_experts.
#include "moe_experts/moe_experts.h"

#include "bindings/bindings.h"

namespace grpo_kernels {
namespace {

GluRows make_glu_rows(int64_t rows, int64_t width, int dtype, Address inv_map, int64_t slots, Address weights, bool clamped,
                      double alpha, double limit, bool interleaved, Address preact) {
  return {rows,  width, dtype,       pointer<const int32_t>(inv_map), slots, pointer<const void>(weights), clamped,
          alpha, limit, interleaved, pointer<const void>(preact)};
}

int64_t moe_glu(int64_t rows, int64_t width, int dtype, Address inv_map, int64_t slots, Address weights, bool clamped,
                double alpha, double limit, bool interleaved, Address preact, Address activated, int device,
                Address stream_or_threads) {
  if (device >= 0) throw std::runtime_error("moe_glu: on CUDA this op runs on Triton");
  MoeGluArgs args{};
  args.layout = make_glu_rows(rows, width, dtype, inv_map, slots, weights, clamped, alpha, limit, interleaved, preact);
  args.activated = pointer<void>(activated);
  py::gil_scoped_release release;
  return GK_CALL_CPU(moe_glu, args, int(stream_or_threads));
}

int64_t moe_glu_backward(int64_t rows, int64_t width, int dtype, Address inv_map, int64_t slots, Address weights, bool clamped,
                         double alpha, double limit, bool interleaved, Address preact, Address grad_activated,
                         Address row_terms, Address grad_preact, Address activated, Address grad_weights, int device,
                         Address stream_or_threads) {
  if (device >= 0) throw std::runtime_error("moe_glu_backward: on CUDA this op runs on Triton");
  MoeGluBackwardArgs args{};
  args.layout = make_glu_rows(rows, width, dtype, inv_map, slots, weights, clamped, alpha, limit, interleaved, preact);
  args.grad_activated = pointer<const void>(grad_activated);
  args.row_terms = pointer<const void>(row_terms);
  args.grad_preact = pointer<void>(grad_preact);
  args.activated = pointer<void>(activated);
  args.grad_weights = pointer<void>(grad_weights);
  py::gil_scoped_release release;
  return GK_CALL_CPU(moe_glu_backward, args, int(stream_or_threads));
}

}  // namespace

void bind_moe_experts(py::module_& module) {
  module.def("moe_glu", &moe_glu);
  module.def("moe_glu_backward", &moe_glu_backward);
}

}  // namespace grpo_kernels
