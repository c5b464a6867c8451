// Bindings of the activation of moe_experts.
#include "moe_experts/moe_experts.h"

#include "bindings/fp8.h"
#include "moe_experts/workspace.h"

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

int64_t moe_glu_quantize(int64_t rows, int64_t width, int dtype, Address inv_map, int64_t slots, Address weights, bool clamped,
                         double alpha, double limit, bool interleaved, Address preact, double eps, const Fp8Numbers& activated,
                         const Fp8Numbers& kept, int device, Address stream_or_threads) {
  if (device >= 0) throw std::runtime_error("moe_glu_quantize: on CUDA this op runs on Triton");
  const MoeGluQuantizeArgs args{
      make_glu_rows(rows, width, dtype, inv_map, slots, weights, clamped, alpha, limit, interleaved, preact), float(eps),
      fp8_tensor(activated), fp8_tensor(kept)};
  py::gil_scoped_release release;
  return GK_CALL_CPU(moe_glu_quantize, args, int(stream_or_threads));
}

// How many floats of workspace the backward needs: rows for every thread.
int64_t moe_glu_quantize_workspace(int64_t width, bool transposed, int64_t threads) {
  return threads * GK_ISA::GluWorkspace::of(width, transposed).size;
}

int64_t moe_glu_backward_quantize(int64_t rows, int64_t width, int dtype, Address inv_map, int64_t slots, Address weights,
                                  bool clamped, double alpha, double limit, bool interleaved, Address preact,
                                  const Fp8Numbers& preact_tiles, Address grad_activated, int grad_dtype, Address row_terms,
                                  double eps, double grad_eps, const Fp8Numbers& grad, const Fp8Numbers& grad_t,
                                  Address grad_wide, const Fp8Numbers& activated_t, Address activated_wide,
                                  Address grad_weights, Address workspace, int device, Address stream_or_threads) {
  if (device >= 0) throw std::runtime_error("moe_glu_backward_quantize: on CUDA this op runs on Triton");
  MoeGluBackwardQuantizeArgs args{};
  args.layout = make_glu_rows(rows, width, dtype, inv_map, slots, weights, clamped, alpha, limit, interleaved, preact);
  args.preact = fp8_tensor(preact_tiles);
  args.grad_activated = pointer<const void>(grad_activated);
  args.grad_dtype = grad_dtype;
  args.row_terms = pointer<const float>(row_terms);
  args.eps = float(eps);
  args.grad_eps = float(grad_eps);
  args.grad = fp8_tensor(grad);
  args.grad_t = fp8_tensor(grad_t);
  args.grad_wide = pointer<void>(grad_wide);
  args.activated_t = fp8_tensor(activated_t);
  args.activated_wide = pointer<void>(activated_wide);
  args.grad_weights = pointer<float>(grad_weights);
  args.workspace = pointer<void>(workspace);
  py::gil_scoped_release release;
  return GK_CALL_CPU(moe_glu_backward_quantize, args, int(stream_or_threads));
}

}  // namespace

void bind_moe_experts(py::module_& module) {
  module.def("moe_glu", &moe_glu);
  module.def("moe_glu_backward", &moe_glu_backward);
  module.def("moe_glu_quantize", &moe_glu_quantize);
  module.def("moe_glu_quantize_workspace", &moe_glu_quantize_workspace);
  module.def("moe_glu_backward_quantize", &moe_glu_backward_quantize);
}

}  // namespace grpo_kernels
