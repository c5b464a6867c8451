// Rows over threads. Chunks are handed out dynamically: with a static split, one stolen core makes two threads as slow as one.
#pragma once

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "common/macros.h"

namespace grpo_kernels {
namespace GK_ISA {

// Calls body(worker, begin, end) for consecutive ranges of at most `grain` rows. Calls with the same worker, a number below
// `threads`, never overlap. One thread, or one range, opens no parallel region.
template <typename Body>
inline void parallel_workers(int64_t rows, int threads, int64_t grain, const Body& body) {
  const int64_t chunks = rows <= 0 ? 0 : (rows + grain - 1) / grain;
#if defined(_OPENMP)
  if (threads > 1 && chunks > 1) {
    const int team = int64_t(threads) < chunks ? threads : int(chunks);
#pragma omp parallel for schedule(dynamic, 1) num_threads(team)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t begin = chunk * grain;
      body(omp_get_thread_num(), begin, begin + grain < rows ? begin + grain : rows);
    }
    return;
  }
#else
  (void)threads;
#endif
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t begin = chunk * grain;
    body(0, begin, begin + grain < rows ? begin + grain : rows);
  }
}

// The same for bodies that need no number: body(begin, end).
template <typename Body>
inline void parallel_rows(int64_t rows, int threads, int64_t grain, const Body& body) {
  parallel_workers(rows, threads, grain, [&](int, int64_t begin, int64_t end) { body(begin, end); });
}

}  // namespace GK_ISA
}  // namespace grpo_kernels
