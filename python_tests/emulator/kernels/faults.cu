// Kernels that reverse their input, each with a mistake that a flag switches on; test_faults.py sees that the emulator notices.
#include "common/cuda_launch.h"

using namespace grpo_kernels::GK_ISA;

namespace {

constexpr int kThreads = 96;

struct Arguments {
  const float* in;
  float* out;
  int n;  // as many as there are threads
  bool faulty;
  unsigned* counter;
};

// --- synchronisation ---------------------------------------------------------------------------------------------------------

__global__ void missing_barrier(Arguments a) {
  __shared__ float tile[kThreads];
  const int i = threadIdx.x;
  tile[i] = a.in[i];
  if (!a.faulty) __syncthreads();
  a.out[i] = tile[a.n - 1 - i];
}

// The tile is filled again before everybody has read it.
__global__ void missing_second_barrier(Arguments a) {
  __shared__ float tile[kThreads];
  const int i = threadIdx.x;
  float sum = 0.0f;
  for (int round = 0; round < 2; ++round) {
    tile[i] = round == 0 ? a.in[i] : 0.0f;
    __syncthreads();
    sum += tile[a.n - 1 - i];
    if (!a.faulty) __syncthreads();
  }
  a.out[i] = sum;
}

// "A warp runs in step" has not been true since 2017.
__global__ void missing_syncwarp(Arguments a) {
  __shared__ float tile[kWarp];
  const int i = threadIdx.x;
  tile[i] = a.in[i];
  if (!a.faulty) __syncwarp();
  a.out[i] = tile[a.n - 1 - i];
}

__global__ void barrier_in_a_branch(Arguments a) {
  __shared__ float tile[kThreads];
  const int i = threadIdx.x;
  tile[i] = a.in[i];
  if (a.faulty && i >= 40) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  a.out[i] = tile[a.n - 1 - i];
}

__global__ void exit_before_a_barrier(Arguments a) {
  __shared__ float tile[kThreads];
  const int i = threadIdx.x;
  tile[i] = a.in[i];
  a.out[i] = a.in[a.n - 1 - i];
  if (a.faulty && i == 7) return;
  __syncthreads();
  a.out[i] = tile[a.n - 1 - i];
}

// Every block adds its part, and the last one to arrive writes everything.
__global__ void store_after_the_counter(Arguments a) {
  if (threadIdx.x != 0) return;
  float* parts = a.out + a.n;
  if (!a.faulty) parts[blockIdx.x] = a.in[blockIdx.x];
  __threadfence();
  const bool last = atomicAdd(a.counter, 1u) + 1u == gridDim.x;
  if (a.faulty) parts[blockIdx.x] = a.in[blockIdx.x];
  __threadfence();
  for (int i = 0; last && i < a.n; ++i) a.out[i] = parts[a.n - 1 - i];
}

// --- warp collectives --------------------------------------------------------------------------------------------------------

__global__ void shuffle_in_a_branch(Arguments a) {
  const int lane = threadIdx.x;
  float value = a.in[lane];
  if (a.faulty && lane >= 16) {
    __syncwarp();
  } else {
    value = __shfl_xor_sync(kFullMask, value, 31);
  }
  a.out[lane] = value;
}

// The lane is gone: what it would have given is not defined.
__global__ void shuffle_from_a_lane_that_left(Arguments a) {
  const int lane = threadIdx.x;
  const float value = a.in[lane];
  a.out[lane] = a.in[a.n - 1 - lane];
  if (a.faulty && lane == 3) return;
  a.out[lane] = __shfl_xor_sync(kFullMask, value, 31);
}

__global__ void mask_without_the_caller(Arguments a) {
  a.out[threadIdx.x] = __shfl_xor_sync(a.faulty ? 0x0000ffffu : kFullMask, a.in[threadIdx.x], 31);
}

__global__ void masks_that_differ(Arguments a) {
  const unsigned mask = a.faulty && threadIdx.x >= 16 ? 0xfffffff0u : kFullMask;
  a.out[threadIdx.x] = __shfl_xor_sync(mask, a.in[threadIdx.x], 31);
}

// --- memory ------------------------------------------------------------------------------------------------------------------

__global__ void uninitialised_shared(Arguments a) {
  __shared__ float tile[kThreads];
  const int i = threadIdx.x;
  if (!a.faulty || i < a.n - 1) tile[i] = a.in[i];
  __syncthreads();
  a.out[i] = tile[a.n - 1 - i];
}

__global__ void unwritten_output(Arguments a) {
  const int i = threadIdx.x;
  if (!a.faulty || i < a.n / 4 * 4 - 4) a.out[i] = a.in[a.n - 1 - i];
}

__global__ void read_past_the_input(Arguments a) {
  const int i = threadIdx.x;
  const float next = a.in[a.faulty ? i + 1 : i];
  a.out[i] = next == 12345.0f ? 0.0f : a.in[a.n - 1 - i];
}

__global__ void write_past_the_output(Arguments a) {
  const int i = threadIdx.x;
  a.out[a.faulty ? i + 1 : i] = a.in[a.n - 1 - i];
}

__noinline__ __device__ float element(const float* data, int index) { return data[index]; }

__global__ void static_shared_past_its_end(Arguments a) {
  __shared__ float tile[kThreads];
  const int i = threadIdx.x;
  tile[i] = a.in[i];
  __syncthreads();
  const float next = element(tile, a.faulty ? i + 1 : i);  // through a pointer
  a.out[i] = next == 12345.0f ? 0.0f : tile[a.n - 1 - i];
}

__global__ void index_past_an_axis(Arguments a) {
  __shared__ float tile[kThreads / kWarp][kWarp];
  const int i = threadIdx.x;
  tile[i / kWarp][i % kWarp] = a.in[i];
  __syncthreads();
  const float next = tile[i / kWarp][i % kWarp + int(a.faulty)];  // the next row's first, but for the last row
  const int from = a.n - 1 - i;
  a.out[i] = next == 12345.0f ? 0.0f : tile[from / kWarp][from % kWarp];
}

__global__ void dynamic_shared_past_its_end(Arguments a) {
  float* tile = dynamic_shared<float>();
  const int i = threadIdx.x;
  tile[a.faulty ? i + 1 : i] = a.in[i];
  __syncthreads();
  a.out[i] = tile[a.faulty ? a.n - i : a.n - 1 - i];
}

__global__ void misaligned_vector(Arguments a) {
  const int i = threadIdx.x;
  a.out[i] = a.in[a.n - 1 - i];
  if (i > 0) return;
  const float4 v = *reinterpret_cast<const float4*>(a.in + int(a.faulty));
  a.out[a.n - 1] = a.faulty ? a.in[0] + 0.0f * v.x : v.x;
}

struct Fault {
  const char* name;
  void (*kernel)(Arguments);
  int threads;
  bool blocks;  // a block an element, not a thread an element
};

#define GK_FAULT(kernel, threads, blocks) {#kernel, kernel, threads, blocks}
const Fault kFaults[] = {
    GK_FAULT(missing_barrier, kThreads, false),
    GK_FAULT(missing_second_barrier, kThreads, false),
    GK_FAULT(missing_syncwarp, kWarp, false),
    GK_FAULT(barrier_in_a_branch, kThreads, false),
    GK_FAULT(exit_before_a_barrier, kThreads, false),
    GK_FAULT(store_after_the_counter, kWarp, true),
    GK_FAULT(shuffle_in_a_branch, kWarp, false),
    GK_FAULT(shuffle_from_a_lane_that_left, kWarp, false),
    GK_FAULT(mask_without_the_caller, kWarp, false),
    GK_FAULT(masks_that_differ, kWarp, false),
    GK_FAULT(uninitialised_shared, kThreads, false),
    GK_FAULT(unwritten_output, kThreads, false),
    GK_FAULT(read_past_the_input, kThreads, false),
    GK_FAULT(write_past_the_output, kThreads, false),
    GK_FAULT(static_shared_past_its_end, kThreads, false),
    GK_FAULT(index_past_an_axis, kThreads, false),
    GK_FAULT(dynamic_shared_past_its_end, kThreads, false),
    GK_FAULT(misaligned_vector, kThreads, false),
};

}  // namespace

extern "C" {

// The number of elements that a fault works on, or 0 for an unknown one.
__attribute__((visibility("default"))) int gk_fault_size(const char* name) {
  for (const Fault& fault : kFaults) {
    if (strcmp(fault.name, name) == 0) return fault.threads;
  }
  return 0;
}

__attribute__((visibility("default"))) int gk_fault(const char* name, int faulty, const float* in, float* out) {
  unsigned counter = 0;
  for (const Fault& fault : kFaults) {
    if (strcmp(fault.name, name) != 0) continue;
    const int n = fault.threads;
    launch_with_shared(fault.kernel, fault.blocks ? n : 1, n, n * sizeof(float), nullptr,
                       Arguments{in, out, n, faulty != 0, &counter});
  }
  return launch_status();
}
}
