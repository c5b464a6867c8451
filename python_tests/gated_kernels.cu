// Kernels that test_gates.py compiles: some sound, some with one fault each.

__global__ void streams(const float4* x, float4* y) { y[threadIdx.x] = x[threadIdx.x]; }

__global__ void narrow(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x]; }

__global__ void counts(int* x) { atomicAdd(x, 1); }

__global__ void adds_floats(float* x) { atomicAdd(x, 1.0f); }

__global__ void adds_doubles(double* x) { atomicAdd(x, 1.0); }

__global__ void shares(float* x) {
  __shared__ float buffer[8192];
  buffer[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = buffer[8191 - threadIdx.x];
}

__global__ void uses_stack(const int* index, float* x) {
  float values[32];
#pragma unroll 1
  for (int i = 0; i < 32; ++i) values[index[i]] = x[i];
  x[threadIdx.x] = values[index[threadIdx.x]];
}

// Sixty-four values are alive at a time.
__global__ void many_registers(float* x, int count) {
  float values[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) values[i] = x[i * 256 + threadIdx.x];
  for (int k = 0; k < count; ++k) {
#pragma unroll
    for (int i = 0; i < 64; ++i) values[i] = values[i] * values[(i + 1) % 64] + 1.0f;
  }
#pragma unroll
  for (int i = 0; i < 64; ++i) x[i * 256 + threadIdx.x] = values[i];
}
