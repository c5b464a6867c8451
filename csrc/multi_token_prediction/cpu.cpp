// Blocks of neighbouring rows. A block finds out once, going backwards, how far the document of each row reaches; every depth
// then compares and copies, row by row in the order of memory.

#include "common/parallel.h"
#include "multi_token_prediction/formula.h"

namespace grpo_kernels {
namespace GK_ISA {
namespace {

constexpr int64_t kBlock = 2048;  // rows, whose ends stay in the first-level cache

// ends[i - begin]: the row behind the document of row i, or behind `limit` if that comes first; i itself where it has none.
template <typename P>
void find_ends(const P* positions, int64_t begin, int64_t end, int64_t limit, int64_t* ends) {
  int64_t reach = end;
  while (reach < limit && goes_on(int64_t(positions[reach - 1]), int64_t(positions[reach]))) ++reach;
  for (int64_t i = end - 1; i >= begin; --i) {
    ends[i - begin] = positions[i] < 0 ? i : reach;
    if (i > begin && !goes_on(int64_t(positions[i - 1]), int64_t(positions[i]))) reach = i;
  }
}

// Rows [begin, end) of one sequence.
void document_ends(const MtpTargetsArgs& a, int64_t begin, int64_t end, int64_t* ends) {
  const int64_t last = sequence_end(begin, a.rows, a.sequence_length);
  const int64_t needed = end + a.shift + a.depths;  // nobody asks further
  const int64_t limit = last < needed ? last : needed;
  if (a.positions == nullptr) {
    for (int64_t i = begin; i < end; ++i) ends[i - begin] = limit;
  } else if (a.wide_positions) {
    find_ends(static_cast<const int64_t*>(a.positions), begin, end, limit, ends);
  } else {
    find_ends(static_cast<const int32_t*>(a.positions), begin, end, limit, ends);
  }
}

// One depth of rows [begin, end), `ahead` rows before their tokens. Returns how many have a target.
template <bool masked, typename T>
int64_t write_targets(const MtpTargetsArgs& a, const int64_t* ends, int64_t begin, int64_t end, int64_t ahead, int64_t* out) {
  const T* ids = static_cast<const T*>(a.token_ids) + ahead;
  const uint8_t* mask = a.mask + (masked ? ahead : 0);
  int64_t stop = a.rows - ahead;
  stop = stop < begin ? begin : stop < end ? stop : end;
  int64_t count = 0;
#pragma omp simd reduction(+ : count)
  for (int64_t i = begin; i < stop; ++i) {
    const int64_t id = int64_t(ids[i]);
    const bool valid = (i + ahead < ends[i - begin]) & token_counts(id, a.ignore_index) & (masked ? mask[i] != 0 : true);
    out[i] = valid ? id : -1;
    count += valid;
  }
  for (int64_t i = stop; i < end; ++i) out[i] = -1;
  return count;
}

template <typename T>
void write_block(const MtpTargetsArgs& a, int64_t begin, int64_t end) {
  int64_t ends[kBlock];
  for (int64_t from = begin; from < end;) {
    const int64_t last = sequence_end(from, a.rows, a.sequence_length);
    const int64_t to = last < end ? last : end;
    document_ends(a, from, to, ends + (from - begin));
    from = to;
  }
  for (int64_t k = 0; k < a.depths; ++k) {
    const int64_t ahead = k + a.shift < a.rows ? k + a.shift : a.rows;
    int64_t* out = a.targets + k * a.rows;
    const int64_t count = a.mask == nullptr ? write_targets<false, T>(a, ends, begin, end, ahead, out)
                                            : write_targets<true, T>(a, ends, begin, end, ahead, out);
#pragma omp atomic
    a.counts[k] += count;
  }
}

}  // namespace

int64_t mtp_targets_cpu(const MtpTargetsArgs& a, int threads) {
  for (int64_t k = 0; k < a.depths; ++k) a.counts[k] = 0;
  parallel_rows(a.rows, threads, kBlock, [&](int64_t begin, int64_t end) {
    a.wide_ids ? write_block<int64_t>(a, begin, end) : write_block<int32_t>(a, begin, end);
  });
  return -1;
}

}  // namespace GK_ISA
}  // namespace grpo_kernels
