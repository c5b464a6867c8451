// The part of CUDA that our kernels use, for any C++ compiler: found instead of NVIDIA's header, it makes a .cu file an
// ordinary C++ file whose kernels run on the CPU. What is missing here fails to compile, which is the wanted answer.
//
// Differences in kind: memory is sequentially consistent; floating-point atomics are refused (the kernels' rule); undefined
// results of a shuffle are NaN; static shared memory and uninitialised device globals hold NaN when a block starts.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>
#include <utility>

#include "emulator.h"

#define GK_EMULATED 1
#define CUDART_VERSION 13000

#define __global__
#define __device__
#define __host__
#define __constant__
#define __shared__ static __attribute__((used))  // shared.ld collects these; "used": never optimised to the zeros of a static
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __grid_constant__

#include "cuda_vectors.h"

// --- indices -----------------------------------------------------------------------------------------------------------------

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

#include "cuda_host.h"
#include "cuda_device.h"
