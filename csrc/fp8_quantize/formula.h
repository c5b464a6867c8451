// How a tensor is cut into tiles. What becomes of a tile stands in common/e4m3.h.
#pragma once

#include "common/e4m3.h"
#include "fp8_quantize/fp8_quantize.h"

namespace grpo_kernels {
namespace GK_ISA {

constexpr int64_t kTile = 128;

GK_HOST_DEVICE int64_t tiles(int64_t size) { return (size + kTile - 1) / kTile; }

// Elements of the tile that starts at `begin`.
GK_HOST_DEVICE int64_t tile_size(int64_t begin, int64_t size) { return size - begin < kTile ? size - begin : kTile; }

}  // namespace GK_ISA
}  // namespace grpo_kernels
