#include "common/cuda_probe.h"

#include <cuda_runtime.h>

namespace grpo_kernels {
namespace {

__global__ void probe_kernel() {}

}  // namespace

int cuda_image_probe() {
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&probe_kernel));
  if (status != cudaSuccess) cudaGetLastError();  // leave no error behind for the next launch to report
  return int(status);
}

}  // namespace grpo_kernels
