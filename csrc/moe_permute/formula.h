// What the map of the CPU and that of CUDA must agree on: whose row a slot is, how slots are cut, how segments are filled up.
#pragma once

#include "moe_permute/moe_permute.h"

namespace grpo_kernels {
namespace GK_ISA {

GK_HOST_DEVICE int64_t load_id(const BuildPermutationArgs& a, int64_t slot) {
  return a.wide_ids ? static_cast<const int64_t*>(a.topk_ids)[slot] : int64_t(static_cast<const int32_t*>(a.topk_ids)[slot]);
}

// The expert of an id, counted from the first one that gets rows; -1 where the slot gets none.
GK_HOST_DEVICE int local_expert(const BuildPermutationArgs& a, int64_t id) {
  return id >= a.first && id < a.last ? int(id - a.first) : -1;
}

// Slots of a tile: whole warps; the last tiles may have fewer, or none.
GK_HOST_DEVICE int64_t tile_slots(const BuildPermutationArgs& a) {
  const int64_t even = (a.slots + a.tiles - 1) / a.tiles;
  return (even + 31) / 32 * 32;
}

// Rows of an expert's segment, padding included.
GK_HOST_DEVICE int64_t segment_rows(int64_t tokens, int64_t alignment) {
  return (tokens + alignment - 1) / alignment * alignment;
}

}  // namespace GK_ISA
}  // namespace grpo_kernels
