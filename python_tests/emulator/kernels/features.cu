// What the emulator has to get right, one small kernel each; test_features.py knows the answers.
#include "common/cuda_launch.h"

using namespace grpo_kernels::GK_ISA;

namespace {

// --- warp collectives --------------------------------------------------------------------------------------------------------

template <typename T>
__global__ void shuffle_kernel(const T* in, T* out, int kind, unsigned mask, int amount, int width) {
  const int i = threadIdx.x;
  if (!(mask >> i % 32 & 1u)) return;
  switch (kind) {
    case 0:
      out[i] = __shfl_sync(mask, in[i], amount, width);
      break;
    case 1:
      out[i] = __shfl_up_sync(mask, in[i], amount, width);
      break;
    case 2:
      out[i] = __shfl_down_sync(mask, in[i], amount, width);
      break;
    default:
      out[i] = __shfl_xor_sync(mask, in[i], amount, width);
  }
}

// Fourteen results a lane.
__global__ void vote_kernel(const int* in, int* out, unsigned mask) {
  const int i = threadIdx.x;
  if (!(mask >> i % 32 & 1u)) return;
  const int value = in[i];
  int* mine = out + 14 * i;
  int all = -1;
  __syncwarp(mask);
  mine[0] = int(__ballot_sync(mask, value > 0));
  mine[1] = __any_sync(mask, value > 0);
  mine[2] = __all_sync(mask, value > 0);
  mine[3] = int(__match_any_sync(mask, value));
  mine[4] = int(__match_all_sync(mask, value, &all));
  mine[5] = all;
  mine[6] = __reduce_add_sync(mask, value);
  mine[7] = __reduce_min_sync(mask, value);
  mine[8] = __reduce_max_sync(mask, value);
  mine[9] = int(__reduce_min_sync(mask, unsigned(value)));
  mine[10] = int(__reduce_max_sync(mask, unsigned(value)));
  mine[11] = int(__reduce_and_sync(mask, unsigned(value)));
  mine[12] = int(__reduce_or_sync(mask, unsigned(value)));
  mine[13] = int(__reduce_xor_sync(mask, unsigned(value)));
}

// Two halves of a warp go ways of their own, and meet again.
__global__ void halves_kernel(const int* in, int* out) {
  const int lane = threadIdx.x;
  int value = in[lane];
  if (lane < 16) {
    for (int offset = 8; offset > 0; offset /= 2) value += __shfl_xor_sync(0x0000ffffu, value, offset);
  } else {
    value = __reduce_max_sync(0xffff0000u, value);
  }
  out[lane] = value + __shfl_xor_sync(0xffffffffu, value, 16);
}

// --- blocks ------------------------------------------------------------------------------------------------------------------

// In a template, static shared memory is a variable that the linker merges.
template <typename T>
__global__ void reverse_kernel(const T* in, T* out, int n) {
  __shared__ T fixed[1024];
  T* flexible = dynamic_shared<T>();
  const int i = threadIdx.x;
  if (i < n) fixed[i] = in[blockIdx.x * n + i];
  __syncthreads();
  if (i < n) flexible[i] = fixed[n - 1 - i];
  __syncthreads();
  if (i < n) out[blockIdx.x * n + n - 1 - i] = flexible[n - 1 - i];
}

__global__ void poison_kernel(float* out) {
  __shared__ float fixed[2];
  out[0] = fixed[threadIdx.x % 2];
  out[1] = *dynamic_shared<float>();
}

__global__ void block_vote_kernel(const int* in, int* out) {
  const int i = threadIdx.x, n = blockDim.x;
  out[i] = __syncthreads_count(in[i] > 0);
  out[n + i] = __syncthreads_or(in[i] > 0);
  out[2 * n + i] = __syncthreads_and(in[i] > 0);
}

__global__ void index_kernel(int* out) {
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  atomicAdd(&out[block * 24 + thread], block * 100 + thread);
}

// --- atomics -----------------------------------------------------------------------------------------------------------------

__global__ void atomic_kernel(const int* in, int* ints, unsigned long long* wide) {
  const int value = in[blockIdx.x * blockDim.x + threadIdx.x];
  atomicAdd(&ints[0], value);
  atomicSub(&ints[1], value);
  atomicMin(&ints[2], value);
  atomicMax(&ints[3], value);
  atomicAnd(&ints[4], value);
  atomicOr(&ints[5], value);
  atomicXor(&ints[6], value);
  for (int seen = ints[7];;) {  // a product, by compare and swap
    const int before = atomicCAS(&ints[7], seen, seen * (2 * value + 1));
    if (before == seen) break;
    seen = before;
  }
  atomicExch(&ints[8], 77);
  atomicAdd(wide, (unsigned long long)(value));
}

// A lock that every thread of every block takes in turn.
__global__ void lock_kernel(unsigned* lock, int* count) {
  for (bool done = false; !done;) {
    if (atomicCAS(lock, 0u, 1u) != 0u) continue;
    const int before = *count;
    __threadfence();
    *count = before + 1;
    __threadfence();
    atomicExch(lock, 0u);
    done = true;
  }
}

// --- vectors and bits --------------------------------------------------------------------------------------------------------

__global__ void vector_kernel(const float* in, float* out) {
  const float4 v = __ldg(reinterpret_cast<const float4*>(in) + threadIdx.x);
  const double2 d = make_double2(v.x, v.y);
  __stcs(reinterpret_cast<float4*>(out) + threadIdx.x, make_float4(v.w, v.z, float(d.y), float(d.x)));
}

__global__ void bit_kernel(const int* in, int* out) {
  const int v = in[threadIdx.x];
  int* mine = out + 8 * threadIdx.x;
  mine[0] = __popc(unsigned(v));
  mine[1] = __ffs(v);
  mine[2] = __clz(v);
  mine[3] = int(__brev(unsigned(v)));
  mine[4] = __float_as_int(__int_as_float(v));
  mine[5] = int(__byte_perm(unsigned(v), 0x77665544u, 0x7190u));
  mine[6] = __popcll((long long)(v)) + __clzll(v) + __ffsll(v);
  mine[7] = min(v, 5) + max(v, 5);
}

template <typename T>
int shuffle(const void* in, void* out, int threads, int kind, unsigned mask, int amount, int width) {
  launch(shuffle_kernel<T>, 1, threads, nullptr, static_cast<const T*>(in), static_cast<T*>(out), kind, mask, amount, width);
  return launch_status();
}

}  // namespace

extern "C" {
__attribute__((visibility("default"))) const char* gk_error_text(int error) { return cudaGetErrorString(error); }

#define GK_EXPORT __attribute__((visibility("default"))) int

GK_EXPORT gk_shuffle_float(const void* in, void* out, int threads, int kind, unsigned mask, int amount, int width) {
  return shuffle<float>(in, out, threads, kind, mask, amount, width);
}
GK_EXPORT gk_shuffle_int64(const void* in, void* out, int threads, int kind, unsigned mask, int amount, int width) {
  return shuffle<int64_t>(in, out, threads, kind, mask, amount, width);
}
GK_EXPORT gk_vote(const int* in, int* out, int threads, unsigned mask) {
  launch(vote_kernel, 1, threads, nullptr, in, out, mask);
  return launch_status();
}
GK_EXPORT gk_halves(const int* in, int* out) {
  launch(halves_kernel, 1, 32, nullptr, in, out);
  return launch_status();
}
GK_EXPORT gk_reverse_float(const float* in, float* out, int blocks, int threads, int n) {
  launch_with_shared(reverse_kernel<float>, blocks, threads, n * sizeof(float), nullptr, in, out, n);
  return launch_status();
}
GK_EXPORT gk_reverse_double(const double* in, double* out, int blocks, int threads, int n) {
  launch_with_shared(reverse_kernel<double>, blocks, threads, n * sizeof(double), nullptr, in, out, n);
  return launch_status();
}
GK_EXPORT gk_poison(float* out) {
  launch_with_shared(poison_kernel, 1, 1, 4, nullptr, out);
  return launch_status();
}
GK_EXPORT gk_block_vote(const int* in, int* out, int threads) {
  launch(block_vote_kernel, 1, threads, nullptr, in, out);
  return launch_status();
}
GK_EXPORT gk_index(int* out) {
  launch(index_kernel, dim3(3, 2, 2), dim3(4, 3, 2), nullptr, out);
  return launch_status();
}
GK_EXPORT gk_atomic(const int* in, int* ints, unsigned long long* wide, int blocks, int threads) {
  launch(atomic_kernel, blocks, threads, nullptr, in, ints, wide);
  return launch_status();
}
GK_EXPORT gk_lock(unsigned* lock, int* count, int blocks, int threads) {
  launch(lock_kernel, blocks, threads, nullptr, lock, count);
  return launch_status();
}
GK_EXPORT gk_vector(const float* in, float* out, int threads) {
  launch(vector_kernel, 1, threads, nullptr, in, out);
  return launch_status();
}
GK_EXPORT gk_bits(const int* in, int* out, int threads) {
  launch(bit_kernel, 1, threads, nullptr, in, out);
  return launch_status();
}
GK_EXPORT gk_launch(int blocks_x, int blocks_y, int threads, int shared_bytes, float* out) {
  launch_with_shared(poison_kernel, dim3(blocks_x, blocks_y), threads, size_t(shared_bytes), nullptr, out);
  return launch_status();
}
}
