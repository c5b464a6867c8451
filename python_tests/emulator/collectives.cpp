// What each warp collective makes of the lanes' values.
#include "cuda_runtime.h"

namespace emulator {
namespace {

// --- shuffles: the argument holds a lane or an offset, and the width --------------------------------------------------------

uint64_t value_of(const Lanes& lanes, int source) { return lanes.present >> source & 1u ? lanes.values[source] : kPoison; }

template <typename Source>
uint64_t shuffled(const Lanes& lanes, int lane, uint64_t argument, const Source& source) {
  const int width = int(argument & 0xffffffffu);
  const int first = lane & ~(width - 1);
  const int from = source(lane - first, int(uint32_t(argument >> 32)), width);
  return from < 0 || from >= width ? lanes.values[lane] : value_of(lanes, first + from);
}

uint64_t shfl(const Lanes& lanes, int lane, uint64_t argument) {
  return shuffled(lanes, lane, argument, [](int, int source, int width) { return source & (width - 1); });
}
uint64_t shfl_up(const Lanes& lanes, int lane, uint64_t argument) {
  return shuffled(lanes, lane, argument, [](int at, int offset, int) { return at - offset; });
}
uint64_t shfl_down(const Lanes& lanes, int lane, uint64_t argument) {
  return shuffled(lanes, lane, argument, [](int at, int offset, int) { return at + offset; });
}
// Of a segment below the width, the lanes of a later segment are out of reach, those of an earlier one are not.
uint64_t shfl_xor(const Lanes& lanes, int lane, uint64_t argument) {
  const int width = int(argument & 0xffffffffu), from = (lane ^ int(uint32_t(argument >> 32))) & 31;
  return from > (lane | (width - 1)) ? lanes.values[lane] : value_of(lanes, from);
}

// --- votes and matches ------------------------------------------------------------------------------------------------------

template <typename Wanted>
uint64_t lanes_where(const Lanes& lanes, const Wanted& wanted) {
  uint64_t result = 0;
  for (int i = 0; i < 32; ++i) result |= uint64_t((lanes.present >> i & 1u) != 0 && wanted(lanes.values[i])) << i;
  return result;
}

uint64_t nothing(const Lanes&, int, uint64_t) { return 0; }
uint64_t ballot(const Lanes& lanes, int, uint64_t) {
  return lanes_where(lanes, [](uint64_t value) { return value != 0; });
}
uint64_t match_any(const Lanes& lanes, int lane, uint64_t) {
  return lanes_where(lanes, [&](uint64_t value) { return value == lanes.values[lane]; });
}
uint64_t match_all(const Lanes& lanes, int lane, uint64_t) {
  const uint64_t same = match_any(lanes, lane, 0);
  return same == lanes.present ? same : 0;
}

// --- reductions of 32-bit integers ------------------------------------------------------------------------------------------

template <typename T, typename Merge>
uint64_t reduced(const Lanes& lanes, int lane, const Merge& merge) {
  T total = T(lanes.values[lane]);
  for (int i = 0; i < 32; ++i) {
    if ((lanes.present >> i & 1u) && i != lane) total = merge(total, T(lanes.values[i]));
  }
  return uint32_t(total);
}

#define GK_MERGE(name, type, expression)                                                  \
  uint64_t name(const Lanes& lanes, int lane, uint64_t) {                                 \
    return reduced<type>(lanes, lane, [](type a, type b) -> type { return expression; }); \
  }
GK_MERGE(reduce_add, uint32_t, a + b)
GK_MERGE(reduce_and, uint32_t, a& b)
GK_MERGE(reduce_or, uint32_t, a | b)
GK_MERGE(reduce_xor, uint32_t, a ^ b)
GK_MERGE(reduce_min, uint32_t, a < b ? a : b)
GK_MERGE(reduce_max, uint32_t, a > b ? a : b)
GK_MERGE(reduce_min_signed, int32_t, a < b ? a : b)
GK_MERGE(reduce_max_signed, int32_t, a > b ? a : b)
#undef GK_MERGE

}  // namespace

const Collective kSyncWarp{"__syncwarp", nothing};
const Collective kBallot{"a vote (__ballot_sync, __any_sync, __all_sync)", ballot};
const Collective kMatchAny{"__match_any_sync", match_any};
const Collective kMatchAll{"__match_all_sync", match_all};
const Collective kShfl{"__shfl_sync", shfl};
const Collective kShflUp{"__shfl_up_sync", shfl_up};
const Collective kShflDown{"__shfl_down_sync", shfl_down};
const Collective kShflXor{"__shfl_xor_sync", shfl_xor};
const Collective kReduceAdd{"__reduce_add_sync", reduce_add};
const Collective kReduceAnd{"__reduce_and_sync", reduce_and};
const Collective kReduceOr{"__reduce_or_sync", reduce_or};
const Collective kReduceXor{"__reduce_xor_sync", reduce_xor};
const Collective kReduceMin{"__reduce_min_sync", reduce_min};
const Collective kReduceMax{"__reduce_max_sync", reduce_max};
const Collective kReduceMinSigned{"__reduce_min_sync", reduce_min_signed};
const Collective kReduceMaxSigned{"__reduce_max_sync", reduce_max_signed};

}  // namespace emulator
