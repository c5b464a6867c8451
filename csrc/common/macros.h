// What every kernel source needs to know about its own compilation unit.
//
// One formula serves the CPU and CUDA: GK_HOST_DEVICE marks it. GK_ISA names the instruction set that the unit is compiled for,
// and everything inline lives in the namespace of that name: the linker merges inline functions of equal name, and would
// otherwise put an AVX-512 copy under the baseline kernels.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define GK_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define GK_HOST_DEVICE inline __attribute__((always_inline))  // loops vectorise only when all of their body is inlined
#else
#define GK_HOST_DEVICE inline
#endif

#ifndef GK_ISA
#define GK_ISA isa_host
#endif

// A CPU launcher exists once per instruction set; csrc/common/cpu_isa.h picks one at run time. It returns -1, or the first row
// that holds a fault which only the data shows (an id out of range).
#define GK_DECLARE_CPU_LAUNCHER(name, Args)          \
  namespace isa_baseline {                           \
  int64_t name##_cpu(const Args& args, int threads); \
  }                                                  \
  namespace isa_avx2 {                               \
  int64_t name##_cpu(const Args& args, int threads); \
  }                                                  \
  namespace isa_avx512 {                             \
  int64_t name##_cpu(const Args& args, int threads); \
  }
