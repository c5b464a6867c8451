// The module `_C`: what was built, what this machine can run, and the ops.
#include "bindings/bindings.h"
#include "common/cuda_probe.h"

namespace py = pybind11;
using namespace grpo_kernels;

namespace {

// "" when CUDA kernels can run on the machine, else the reason why not.
std::string cuda_problem() {
#if defined(GK_CUDA)
  int driver = 0;
  const cudaError_t status = cudaDriverGetVersion(&driver);
  if (status != cudaSuccess) return std::string("cudaDriverGetVersion: ") + cudaGetErrorString(status);
  if (driver == 0) return "no CUDA driver is installed";
  if (driver / 1000 < CUDART_VERSION / 1000) {
    return "the driver supports CUDA " + std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10) +
           ", but the extension was built with CUDA " GK_CUDA_VERSION;
  }
  return "";
#else
  return "built without CUDA kernels";
#endif
}

// "" when the extension holds code that the device can run: machine code of its generation, or PTX of an older one.
std::string cuda_device_problem(int device) {
#if defined(GK_CUDA)
  const std::string problem = cuda_problem();
  if (!problem.empty()) return problem;
  DeviceGuard guard(device);
  const int status = cuda_image_probe();
  if (status == cudaSuccess) return "";
  return std::string("no kernel image for this device (built for " GK_CUDA_ARCHS "): ") +
         cudaGetErrorString(static_cast<cudaError_t>(status));
#else
  (void)device;
  return cuda_problem();
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of grpo_kernels. Private: call the functions of the package.";
#if defined(GK_CUDA)
  m.attr("cuda_version") = GK_CUDA_VERSION;
  m.attr("cuda_archs") = GK_CUDA_ARCHS;
#else
  m.attr("cuda_version") = py::none();
  m.attr("cuda_archs") = "";
#endif
#if defined(GK_OPENMP)
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
#if defined(__clang__)
  m.attr("compiler") = __VERSION__;  // begins with "Clang"
#else
  m.attr("compiler") = "GCC " __VERSION__;
#endif
  m.def("cpu_isa", &cpu_isa_name);
  m.def("cuda_device_problem", &cuda_device_problem);
  m.def("set_tensor_type", &set_tensor_type);
  m.def("signature", &signature);
  bind_fp8_quantize(m);
  bind_group_advantages(m);
  bind_grpo_loss(m);
  bind_moe_experts(m);
  bind_moe_permute(m);
  bind_moe_router(m);
  bind_multi_token_prediction(m);
  bind_speculative_sampling(m);
  bind_token_log_probs(m);
}
