// Launch helpers of the CUDA C++ kernels.
#pragma once

#include <cuda_runtime.h>

#include "common/macros.h"

namespace grpo_kernels {
namespace GK_ISA {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The error of the launch just made; reading clears it. The extension has a CUDA runtime of its own, so it is no one else's.
inline int launch_status() { return int(cudaGetLastError()); }

// Butterfly sums: every lane ends with the same bits, whichever lane starts.
__device__ __forceinline__ double warp_sum(double value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullMask, value, offset);
  return value;
}

__device__ __forceinline__ int64_t warp_sum(int64_t value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value += int64_t(__shfl_xor_sync(kFullMask, (long long)(value), offset));
  }
  return value;
}

}  // namespace GK_ISA
}  // namespace grpo_kernels
