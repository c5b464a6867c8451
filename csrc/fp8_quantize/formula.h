// How a tensor is cut into blocks of 128 x 128. What becomes of a tile stands in common/e4m3.h.
#pragma once

#include "common/e4m3.h"
#include "fp8_quantize/fp8_quantize.h"

namespace grpo_kernels {
namespace GK_ISA {

// A block of x, and where it lies.
template <typename T>
struct Block {
  const T* x;
  int64_t stride, batch, row, column, rows, columns;  // the first row and column, and how many
  int64_t next_columns;                               // of the block to the right, which comes next
};

// The block that is `place`th, batch by batch and row of blocks by row of blocks.
template <typename T>
inline Block<T> block_at(const Fp8QuantizeArgs& a, int64_t place) {
  const int64_t across = tiles(a.columns), down = tiles(a.rows);
  Block<T> block;
  block.column = place % across * kTile;
  block.row = place / across % down * kTile;
  block.batch = place / across / down;
  block.rows = tile_size(block.row, a.rows);
  block.columns = tile_size(block.column, a.columns);
  block.next_columns = block.column + kTile < a.columns ? tile_size(block.column + kTile, a.columns) : 0;
  block.stride = a.row_stride;
  block.x = static_cast<const T*>(a.x) + block.batch * a.batch_stride + block.row * block.stride + block.column;
  return block;
}

}  // namespace GK_ISA
}  // namespace grpo_kernels
