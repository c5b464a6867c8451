// Rows alone go tile by tile: a tile is read once and stays in the first-level cache until its codes are written. Everything
// else goes in blocks of 128 x 128: one read from memory, the maxima of columns or of the block, the codes in a buffer, which
// is transposed there so that what is written are whole lines.

#include "common/cpu_fp8.h"
#include "common/parallel.h"
#include "fp8_quantize/formula.h"

namespace grpo_kernels {
namespace GK_ISA {
namespace {

constexpr int64_t kElementsPerChunk = 65536;   // per task
constexpr int64_t kElementsPerThread = 65536;  // below that a second thread costs more than it brings

inline int threads_for(int64_t elements, int threads) { return elements < kElementsPerThread ? 1 : threads; }

template <bool kPowerOfTwo, typename T>
void quantize_rows(const Fp8QuantizeArgs& a, int threads) {
  const int64_t width = a.columns < 1 ? 1 : a.columns;
  const int64_t grain = kElementsPerChunk / width < 1 ? 1 : kElementsPerChunk / width;
  const Fp8Tensor& out = a.plain;
  parallel_rows(a.batch * a.rows, threads_for(a.batch * a.rows * width, threads), grain, [&](int64_t begin, int64_t end) {
    for (int64_t place = begin; place < end; ++place) {
      const int64_t batch = place / a.rows, row = place % a.rows;
      const T* x = static_cast<const T*>(a.x) + batch * a.batch_stride + row * a.row_stride;
      uint8_t* data = out.data + batch * out.batch_stride + row * out.row_stride;
      float* scale = out.scale + batch * out.scale_batch_stride + row * out.scale_row_stride;
      quantize_row<kPowerOfTwo>(x, a.columns, a.eps, data, scale, out.scale_tile_stride);
    }
  });
}

// Fetches a row of the block that comes next: rows are too many streams for the processor to foresee them.
template <typename T>
inline void fetch_next(const Block<T>& block, const T* x) {
  constexpr int64_t kPerLine = 64 / int64_t(sizeof(T));
  for (int64_t i = 0; i < block.next_columns; i += kPerLine) __builtin_prefetch(x + kTile + i);
}

// The largest magnitude of each of the block's columns, as bits.
template <typename T>
inline void column_maxima(const Block<T>& block, int32_t* maxima) {
  memset(maxima, 0, kTile * sizeof(int32_t));
  for (int64_t row = 0; row < block.rows; ++row) {
    const T* x = block.x + row * block.stride;
    fetch_next(block, x);
#pragma omp simd
    for (int64_t i = 0; i < block.columns; ++i) {
      const int32_t bits = magnitude_bits(load_float(x[i]));
      maxima[i] = bits > maxima[i] ? bits : maxima[i];
    }
  }
}

template <typename T>
inline void write_turned(const Block<T>& block, const Tile& tile, const Fp8Tensor& out) {
  uint8_t* data = out.data + block.batch * out.batch_stride + block.column * out.row_stride + block.row;
  write_transposed(tile, block.rows, block.columns, data, out.row_stride);
}

// A block whose rows and columns have tiles of their own.
template <bool kPowerOfTwo, typename T>
void quantize_narrow(const Fp8QuantizeArgs& a, const Block<T>& block) {
  alignas(64) int32_t maxima[kTile];
  column_maxima(block, maxima);
  const Fp8Tensor& turned = a.transposed;
  uint8_t* data = turned.data + block.batch * turned.batch_stride + block.column * turned.row_stride + block.row;
  float* scale = turned.scale + block.batch * turned.scale_batch_stride + block.column * turned.scale_row_stride +
                 block.row / kTile * turned.scale_tile_stride;
  quantize_columns<kPowerOfTwo>(block.x, block.stride, block.rows, block.columns, maxima, a.eps, data, turned.row_stride, scale,
                                turned.scale_row_stride);
  if (a.plain.data == nullptr) return;
  const Fp8Tensor& plain = a.plain;
  data = plain.data + block.batch * plain.batch_stride + block.row * plain.row_stride + block.column;
  scale = plain.scale + block.batch * plain.scale_batch_stride + block.row * plain.scale_row_stride +
          block.column / kTile * plain.scale_tile_stride;
  for (int64_t row = 0; row < block.rows; ++row) {
    scale[row * plain.scale_row_stride] =
        quantize_row_tile<kPowerOfTwo>(block.x + row * block.stride, block.columns, a.eps, data + row * plain.row_stride);
  }
}

inline void set_scale(const Fp8Tensor& out, int64_t batch, int64_t row, int64_t column, float scale) {
  out.scale[batch * out.scale_batch_stride + row / kTile * out.scale_row_stride + column / kTile * out.scale_tile_stride] =
      scale;
}

// A block with one scale: its codes serve both results.
template <bool kPowerOfTwo, typename T>
void quantize_square(const Fp8QuantizeArgs& a, const Block<T>& block) {
  alignas(64) int32_t maxima[kTile];
  alignas(64) float factors[kTile];
  Tile tile;
  column_maxima(block, maxima);
  int32_t amax = 0;
  for (int64_t i = 0; i < kTile; ++i) amax = maxima[i] > amax ? maxima[i] : amax;
  float factor;
  const float scale = e4m3_scale<kPowerOfTwo>(uint32_t(amax), a.eps, factor);
  for (int64_t i = 0; i < kTile; ++i) factors[i] = factor;
  encode_columns<kPowerOfTwo>(block.x, block.stride, block.rows, block.columns, factors, tile);
  const Fp8Tensor& plain = a.plain;
  if (plain.data != nullptr) {
    set_scale(plain, block.batch, block.row, block.column, scale);
    uint8_t* data = plain.data + block.batch * plain.batch_stride + block.row * plain.row_stride + block.column;
    for (int64_t row = 0; row < block.rows; ++row) {
      memcpy(data + row * plain.row_stride, tile.codes + row * kTile, size_t(block.columns));
    }
  }
  if (a.transposed.data != nullptr) {
    set_scale(a.transposed, block.batch, block.column, block.row, scale);
    write_turned(block, tile, a.transposed);
  }
}

template <bool kPowerOfTwo, typename T>
void quantize(const Fp8QuantizeArgs& a, int threads) {
  if (!a.square && a.transposed.data == nullptr) return quantize_rows<kPowerOfTwo, T>(a, threads);
  const int64_t grain = kElementsPerChunk / (kTile * kTile);
  const int used = threads_for(a.batch * a.rows * a.columns, threads);
  parallel_rows(a.batch * tiles(a.rows) * tiles(a.columns), used, grain, [&](int64_t begin, int64_t end) {
    for (int64_t place = begin; place < end; ++place) {
      const Block<T> block = block_at<T>(a, place);
      a.square ? quantize_square<kPowerOfTwo>(a, block) : quantize_narrow<kPowerOfTwo>(a, block);
    }
  });
}

template <typename T>
int64_t quantize_from(const Fp8QuantizeArgs& a, int threads) {
  a.power_of_two ? quantize<true, T>(a, threads) : quantize<false, T>(a, threads);
  return -1;
}

template <typename T>
int64_t dequantize_to(const Fp8DequantizeArgs& a, int threads) {
  const int64_t width = a.columns < 1 ? 1 : a.columns;
  const int64_t grain = kElementsPerChunk / width < 1 ? 1 : kElementsPerChunk / width;
  const int64_t step = a.column_tile == 1 ? 1 : 0;
  const Fp8Tensor& in = a.in;
  parallel_rows(a.batch * a.rows, threads_for(a.batch * a.rows * width, threads), grain, [&](int64_t begin, int64_t end) {
    for (int64_t place = begin; place < end; ++place) {
      const int64_t batch = place / a.rows, row = place % a.rows;
      const uint8_t* data = in.data + batch * in.batch_stride + row * in.row_stride;
      const float* scale = in.scale + batch * in.scale_batch_stride + row / a.row_tile * in.scale_row_stride;
      T* out = static_cast<T*>(a.out) + place * a.columns;
      for (int64_t start = 0; start < a.columns; start += kTile) {
        const int64_t count = tile_size(start, a.columns);
        const float* first = scale + start / a.column_tile * in.scale_tile_stride;
        if (step == 0) {
          const float shared = *first;
#pragma omp simd
          for (int64_t i = 0; i < count; ++i) from_arithmetic(e4m3_decode(data[start + i]) * shared, out[start + i]);
        } else {
          for (int64_t i = 0; i < count; ++i) {
            from_arithmetic(e4m3_decode(data[start + i]) * first[i * in.scale_tile_stride], out[start + i]);
          }
        }
      }
    }
  });
  return -1;
}

}  // namespace

int64_t fp8_quantize_cpu(const Fp8QuantizeArgs& a, int threads) {
  return by_dtype(a.dtype, [&](auto element) { return quantize_from<decltype(element)>(a, threads); });
}

int64_t fp8_dequantize_cpu(const Fp8DequantizeArgs& a, int threads) {
  return by_dtype(a.dtype, [&](auto element) { return dequantize_to<decltype(element)>(a, threads); });
}

}  // namespace GK_ISA
}  // namespace grpo_kernels
