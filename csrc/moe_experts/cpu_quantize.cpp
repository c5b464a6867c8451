// What the activation computes goes to eight bits before it leaves the cache. Forward, a block's values are the tiles.
// Backward, a tile may hold gates and ups: a row is finished in float32 first. Tiles of 128 rows wait for their last row; the
// largest magnitudes of the columns are found on the way, so that the block is read once.

#include "common/cpu_fp8.h"
#include "common/parallel.h"
#include "moe_experts/cpu_row.h"
#include "moe_experts/workspace.h"

namespace grpo_kernels {
namespace GK_ISA {
namespace {

using namespace glu_kernels;

inline float* scale_at(const Fp8Tensor& out, int64_t row, int64_t column) {
  return out.scale + row * out.scale_row_stride + column / kTile * out.scale_tile_stride;
}

// `count` numbers of a row, from a column at which a tile begins.
template <typename T>
inline void write_tiles(const T* x, int64_t count, float eps, const Fp8Tensor& out, int64_t row, int64_t column) {
  quantize_row<true>(x, count, eps, out.data + row * out.row_stride + column, scale_at(out, row, column),
                     out.scale_tile_stride);
}

void clear_tiles(const Fp8Tensor& out, int64_t row, int64_t columns, float eps) {
  float factor;
  memset(out.data + row * out.row_stride, 0, size_t(columns));
  for (int64_t start = 0; start < columns; start += kTile) *scale_at(out, row, start) = e4m3_scale<true>(0, eps, factor);
}

// --- forward

template <bool kClamped, typename T>
void forward_row(const MoeGluQuantizeArgs& a, int64_t row) {
  const GluRows& l = a.layout;
  if (l.inv_map[row] < 0) {
    clear_tiles(a.activated, row, l.width, a.eps);
    if (a.kept.data != nullptr) clear_tiles(a.kept, row, 2 * l.width, a.eps);
    return;
  }
  const Glu<kClamped, float> glu{float(l.alpha), float(l.limit)};
  const T* preact = static_cast<const T*>(l.preact) + row * 2 * l.width;
  alignas(64) float gate[kBlock], up[kBlock];
  for (int64_t begin = 0; begin < l.width; begin += kBlock) {
    const int64_t count = l.width - begin < kBlock ? l.width - begin : kBlock;
    load_pairs(l, preact, begin, count, gate, up);
#pragma omp simd aligned(gate, up : 64)
    for (int64_t i = 0; i < count; ++i) gate[i] = glu.value(gate[i], up[i]);
    write_tiles(gate, count, a.eps, a.activated, row, begin);
  }
  if (a.kept.data != nullptr) write_tiles(preact, 2 * l.width, a.eps, a.kept, row, 0);
}

template <bool kClamped, typename T>
int64_t forward(const MoeGluQuantizeArgs& a, int threads) {
  const GluRows& l = a.layout;
  parallel_rows(l.rows, threads_for(l, threads), rows_per_chunk(l), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) forward_row<kClamped, T>(a, row);
  });
  return -1;
}

// --- backward

void load_any(int dtype, const void* base, int64_t offset, int64_t count, float* out) {
  by_float_dtype(dtype, [&](auto element) { load(static_cast<const decltype(element)*>(base) + offset, count, out); });
}

void store_any(int dtype, const float* values, int64_t count, void* base, int64_t offset) {
  by_float_dtype(dtype, [&](auto element) { store(values, count, static_cast<decltype(element)*>(base) + offset); });
}

void load_tiles(const Fp8Tensor& in, int64_t row, int64_t columns, float* out) {
  const uint8_t* data = in.data + row * in.row_stride;
  for (int64_t start = 0; start < columns; start += kTile) {
    const int64_t count = tile_size(start, columns);
    const float scale = *scale_at(in, row, start);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[start + i] = e4m3_decode(data[start + i]) * scale;
  }
}

// From a row's pre-activations in `grad` and the gradient of its activation in `activated`: the gradient of the former, and the
// activation, both times `weight`. Returns <gradient, activation>. As moe_glu_backward of float32, step by step.
template <bool kClamped>
double differentiate_row(const GluRows& l, float weight, double sum, float* grad, float* activated) {
  const Glu<kClamped, float> glu{float(l.alpha), float(l.limit)};
  alignas(64) float gate[kBlock], up[kBlock], upstream[kBlock];
  for (int64_t begin = 0; begin < l.width; begin += kBlock) {
    const int64_t count = l.width - begin < kBlock ? l.width - begin : kBlock;
    load_pairs(l, grad, begin, count, gate, up);
    load(activated + begin, count, upstream);
    sum += differentiate(glu, count, gate, up, upstream);
    scale(count, weight, gate);
    scale(count, weight, up);
    scale(count, weight, upstream);
    store_pairs(l, gate, up, begin, count, grad);
    store(upstream, count, activated + begin);
  }
  return sum;
}

// Computes a row, or clears it; false where its slot does not exist.
template <bool kClamped>
bool compute_row(const MoeGluBackwardQuantizeArgs& a, int64_t row, float* grad, float* activated) {
  const GluRows& l = a.layout;
  const int32_t slot = l.inv_map[row];
  if (slot < 0 || slot >= l.slots) {
    memset(grad, 0, size_t(2 * l.width) * sizeof(float));
    memset(activated, 0, size_t(l.width) * sizeof(float));
    return slot < 0;
  }
  load_tiles(a.preact, row, 2 * l.width, grad);
  if (a.grad_activated != nullptr) {
    load_any(a.grad_dtype, a.grad_activated, row * l.width, l.width, activated);
  } else {
    memset(activated, 0, size_t(l.width) * sizeof(float));
  }
  const float weight = static_cast<const float*>(l.weights)[slot];
  const double term = a.row_terms == nullptr ? 0.0 : double(a.row_terms[row]);
  const double sum = differentiate_row<kClamped>(l, weight, term, grad, activated);
  if (a.grad_weights != nullptr) a.grad_weights[slot] = float(sum);
  return true;
}

void write_row(const MoeGluBackwardQuantizeArgs& a, int64_t row, const float* grad, const float* activated) {
  const GluRows& l = a.layout;
  if (a.grad.data != nullptr) write_tiles(grad, 2 * l.width, a.grad_eps, a.grad, row, 0);
  if (a.grad_wide != nullptr) store_any(l.dtype, grad, 2 * l.width, a.grad_wide, row * 2 * l.width);
  if (a.activated_wide != nullptr) store_any(l.dtype, activated, l.width, a.activated_wide, row * l.width);
}

void add_maxima(const float* row, int64_t columns, int32_t* maxima) {
#pragma omp simd
  for (int64_t i = 0; i < columns; ++i) {
    const int32_t bits = magnitude_bits(row[i]);
    maxima[i] = bits > maxima[i] ? bits : maxima[i];
  }
}

// The tiles of columns of `rows` rows, of which the first is `row`.
void write_columns(const float* x, int64_t stride, int64_t row, int64_t rows, int64_t columns, const int32_t* maxima, float eps,
                   const Fp8Tensor& out) {
  for (int64_t start = 0; start < columns; start += kTile) {
    quantize_columns<true>(x + start, stride, rows, tile_size(start, columns), maxima + start, eps,
                           out.data + start * out.row_stride + row, out.row_stride, scale_at(out, start, row),
                           out.scale_row_stride);
  }
}

// Rows that share tiles if there are transposed results. Returns the first without a slot, or -1.
template <bool kClamped>
int64_t backward_rows(const MoeGluBackwardQuantizeArgs& a, const GluWorkspace& w, int64_t begin, int64_t end, float* memory) {
  const int64_t width = a.layout.width;
  const bool of_grad = a.grad_t.data != nullptr, of_activated = a.activated_t.data != nullptr;
  int32_t* maxima = reinterpret_cast<int32_t*>(memory + w.rows * w.stride);
  memset(maxima, 0, size_t(w.stride) * sizeof(int32_t));
  int64_t fault = -1;
  for (int64_t row = begin; row < end; ++row) {
    float* grad = memory + (w.rows == 1 ? 0 : row - begin) * w.stride;
    float* activated = grad + w.activated;
    if (!compute_row<kClamped>(a, row, grad, activated) && fault < 0) fault = row;
    write_row(a, row, grad, activated);
    if (of_grad) add_maxima(grad, 2 * width, maxima);
    if (of_activated) add_maxima(activated, width, maxima + w.activated);
  }
  const int64_t rows = end - begin;
  if (of_grad) write_columns(memory, w.stride, begin, rows, 2 * width, maxima, a.grad_eps, a.grad_t);
  if (of_activated) {
    write_columns(memory + w.activated, w.stride, begin, rows, width, maxima + w.activated, a.eps, a.activated_t);
  }
  return fault;
}

template <bool kClamped>
int64_t backward(const MoeGluBackwardQuantizeArgs& a, int threads) {
  const GluRows& l = a.layout;
  const bool transposed = a.grad_t.data != nullptr || a.activated_t.data != nullptr;
  const GluWorkspace w = GluWorkspace::of(l.width, transposed);
  const int64_t grain = transposed ? kTile : rows_per_chunk(l);
  int64_t fault = -1;
  parallel_workers(l.rows, threads_for(l, threads), grain, [&](int worker, int64_t begin, int64_t end) {
    const int64_t bad = backward_rows<kClamped>(a, w, begin, end, static_cast<float*>(a.workspace) + worker * w.size);
    if (bad >= 0) {
#pragma omp critical(moe_glu_quantize_fault)
      fault = fault < 0 || bad < fault ? bad : fault;
    }
  });
  return fault;
}

}  // namespace

int64_t moe_glu_quantize_cpu(const MoeGluQuantizeArgs& a, int threads) {
  return by_float_dtype(a.layout.dtype, [&](auto element) {
    using T = decltype(element);
    return a.layout.clamped ? forward<true, T>(a, threads) : forward<false, T>(a, threads);
  });
}

int64_t moe_glu_backward_quantize_cpu(const MoeGluBackwardQuantizeArgs& a, int threads) {
  return a.layout.clamped ? backward<true>(a, threads) : backward<false>(a, threads);
}

}  // namespace GK_ISA
}  // namespace grpo_kernels
