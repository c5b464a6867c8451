// Launch helpers of the CUDA C++ kernels.
#pragma once

#include <cuda_runtime.h>

#include <utility>

#include "common/macros.h"

namespace grpo_kernels {
namespace GK_ISA {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Launches a kernel; launch_status() says whether that went well. A function rather than `<<<>>>`, which is no C++: the same
// source then compiles for the CPU emulation of python_tests/emulator.
template <typename... Parameters, typename... Arguments>
void launch_with_shared(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, size_t shared_bytes, void* stream,
                        Arguments&&... arguments) {
  constexpr size_t kDefaultLimit = 48 << 10;
  const auto address = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > kDefaultLimit) {
    const cudaError_t status = cudaFuncSetAttribute(address, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (status != cudaSuccess) return;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, void* stream, Arguments&&... arguments) {
  launch_with_shared(kernel, blocks, threads, 0, stream, std::forward<Arguments>(arguments)...);
}

// The error of the launches just made; reading clears it. The extension has a CUDA runtime of its own, so it is no one else's.
inline int launch_status() { return int(cudaGetLastError()); }

// The block's dynamic shared memory, aligned to 16 bytes.
template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
#if defined(GK_EMULATED)
  return static_cast<T*>(emulator::dynamic_shared());
#else
  extern __shared__ __align__(16) unsigned char bytes[];
  return reinterpret_cast<T*>(bytes);
#endif
}

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
