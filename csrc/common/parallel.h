// Rows over threads. Chunks are handed out dynamically: with a static split, one stolen core makes two threads as slow as one.
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace grpo_kernels {
namespace GK_ISA {

// Calls body(begin, end) for consecutive ranges of at most `grain` rows. One thread, or one range, opens no parallel region.
template <typename Body>
inline void parallel_rows(int64_t rows, int threads, int64_t grain, const Body& body) {
  const int64_t chunks = rows <= 0 ? 0 : (rows + grain - 1) / grain;
#if defined(_OPENMP)
  if (threads > 1 && chunks > 1) {
    const int team = int64_t(threads) < chunks ? threads : int(chunks);
#pragma omp parallel for schedule(dynamic, 1) num_threads(team)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t begin = chunk * grain;
      body(begin, begin + grain < rows ? begin + grain : rows);
    }
    return;
  }
#else
  (void)threads;
#endif
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t begin = chunk * grain;
    body(begin, begin + grain < rows ? begin + grain : rows);
  }
}

}  // namespace GK_ISA
}  // namespace grpo_kernels
