// Sums that CPU kernels keep in lanes. GCC holds the accumulator of a loop in memory where its size differs from that of the
// terms, and every step waits for the one before; lanes that take several terms at a time do not.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/macros.h"

namespace grpo_kernels {
namespace GK_ISA {

// The sum of all lanes, a power of two, which it overwrites.
template <typename A, size_t kLanes>
inline A sum_lanes(A (&lanes)[kLanes]) {
  for (size_t half = kLanes / 2; half > 0; half /= 2) {
    for (size_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  }
  return lanes[0];
}

// Both pass over NaN in `value`.
template <typename A>
GK_HOST_DEVICE A smaller(A least, A value) {
  return value < least ? value : least;
}
template <typename A>
GK_HOST_DEVICE A larger(A most, A value) {
  return value > most ? value : most;
}

// Fetches the cache lines of the first `bytes` from `data` on, which may lie outside of any object.
inline void prefetch(const void* data, int64_t bytes) {
  const char* line = static_cast<const char*>(data);
  for (int64_t offset = 0; offset < bytes; offset += 64) __builtin_prefetch(line + offset);
}

}  // namespace GK_ISA
}  // namespace grpo_kernels
