// Whether the binary holds code that the current CUDA device can run.
#pragma once

namespace grpo_kernels {

// A cudaError_t: cudaErrorNoKernelImageForDevice when it does not.
int cuda_image_probe();

}  // namespace grpo_kernels
