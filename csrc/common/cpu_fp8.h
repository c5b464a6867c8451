// Tiles of float, or of what converts to it, to e4m3 on the CPU: of a row one by one, of columns in blocks of 128 x 128.
#pragma once

#include "common/cpu_dtype.h"
#include "common/cpu_transpose.h"
#include "common/e4m3.h"

namespace grpo_kernels {
namespace GK_ISA {

struct Tile {
  alignas(64) uint8_t codes[kTile * kTile];
};

template <typename T>
GK_HOST_DEVICE float load_float(T value) {
  return float(to_arithmetic(value));
}

GK_HOST_DEVICE int32_t magnitude_bits(float value) { return int32_t(float_to_bits(value) & kMagnitudeBits); }

// The codes of a row's tile; returns its scale.
template <bool kPowerOfTwo, typename T>
GK_HOST_DEVICE float quantize_some(const T* x, int64_t count, float eps, uint8_t* out) {
  alignas(64) float values[kTile];
  int32_t amax = 0;
#pragma omp simd reduction(max : amax)
  for (int64_t i = 0; i < count; ++i) {
    values[i] = load_float(x[i]);
    const int32_t bits = magnitude_bits(values[i]);
    amax = bits > amax ? bits : amax;
  }
  float factor;
  const float scale = e4m3_scale<kPowerOfTwo>(uint32_t(amax), eps, factor);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = e4m3_scaled<kPowerOfTwo>(values[i], factor);
  return scale;
}

template <bool kPowerOfTwo, typename T>
inline float quantize_row_tile(const T* x, int64_t count, float eps, uint8_t* out) {
  return count == kTile ? quantize_some<kPowerOfTwo>(x, kTile, eps, out) : quantize_some<kPowerOfTwo>(x, count, eps, out);
}

// The tiles of `columns` numbers of a row; their scales lie `scale_stride` apart.
template <bool kPowerOfTwo, typename T>
inline void quantize_row(const T* x, int64_t columns, float eps, uint8_t* data, float* scale, int64_t scale_stride) {
  for (int64_t start = 0; start < columns; start += kTile, scale += scale_stride) {
    *scale = quantize_row_tile<kPowerOfTwo>(x + start, tile_size(start, columns), eps, data + start);
  }
}

// Codes of at most 128 x 128 numbers, a factor for each column.
template <bool kPowerOfTwo, typename T>
inline void encode_columns(const T* x, int64_t stride, int64_t rows, int64_t columns, const float* factors, Tile& tile) {
  for (int64_t row = 0; row < rows; ++row, x += stride) {
    uint8_t* codes = tile.codes + row * kTile;
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i) codes[i] = e4m3_scaled<kPowerOfTwo>(load_float(x[i]), factors[i]);
  }
}

// The codes' transpose, [columns, rows], at `data`.
inline void write_transposed(const Tile& tile, int64_t rows, int64_t columns, uint8_t* data, int64_t stride) {
  Tile turned;
  transpose_tile(tile.codes, rows, columns, turned.codes);
  for (int64_t i = 0; i < columns; ++i) memcpy(data + i * stride, turned.codes + i * kTile, size_t(rows));
}

// The tiles that are the columns of at most 128 x 128 numbers, given the bits of their largest magnitudes. They go to the
// rows of a transposed tensor, whose first code and scale are `data` and `scale`.
template <bool kPowerOfTwo, typename T>
inline void quantize_columns(const T* x, int64_t stride, int64_t rows, int64_t columns, const int32_t* maxima, float eps,
                             uint8_t* data, int64_t data_stride, float* scale, int64_t scale_stride) {
  alignas(64) float factors[kTile];
  Tile tile;
  for (int64_t i = 0; i < columns; ++i) {
    scale[i * scale_stride] = e4m3_scale<kPowerOfTwo>(uint32_t(maxima[i]), eps, factors[i]);
  }
  encode_columns<kPowerOfTwo>(x, stride, rows, columns, factors, tile);
  write_transposed(tile, rows, columns, data, data_stride);
}

}  // namespace GK_ISA
}  // namespace grpo_kernels
