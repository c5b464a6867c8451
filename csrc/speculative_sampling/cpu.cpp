// Verification of drafts: a sequence to a thread, position by position. The token and the greedy rule read no position behind
// the first rejection. A row of logits is read once for its softmax, and those at the position of the drawn token once more,
// block by block, for the race; filters read it twice more each.
//
// Sums run over an aligned buffer and in double, so neither addresses nor other sequences decide their order.

#include "common/parallel.h"
#include "speculative_sampling/cpu_row.h"

namespace grpo_kernels {
namespace GK_ISA {
namespace {

constexpr int64_t kElementsPerChunk = 32768;   // per task
constexpr int64_t kElementsPerThread = 65536;  // below that a second thread costs more than it brings

template <typename A>
double number_of(const void* values, int64_t row) {
  return values == nullptr ? 1.0 : double(static_cast<const A*>(values)[row]);
}

// 1 / temperature, finite also where that overflows: all but the largest logit then have probability 0. And normal: what is
// below that may be taken for 0, and -inf * 0 is NaN.
template <typename A>
A factor_of(double temperature, A) {
  const double factor = 1.0 / temperature, least = least_normal(A()), most = largest_finite(A());
  return A(factor < least ? least : factor < most ? factor : most);
}

// Whether the row's own numbers are in range.
template <typename T>
bool in_range(const Sequence<T>& s, double temperature) {
  if (s.length < 0 || s.length > s.args.drafts) return false;
  for (int64_t i = 0; i < s.length; ++i) {
    if (s.id(i) < 0 || s.id(i) >= s.args.vocab) return false;
  }
  return temperature > 0.0 && temperature < __builtin_inf() && s.top_p > 0.0 && s.top_p <= 1.0;
}

template <typename T>
bool verify_row(const VerifyDraftArgs& a, int64_t row, char* workspace) {
  using A = typename Arithmetic<T>::type;
  const double temperature = number_of<A>(a.temperatures, row);
  static_assert(sizeof(BlockPosition<A>) <= kDraftBytes, "");
  Sequence<T> s{a,
                row,
                a.draft_lengths == nullptr ? a.drafts : a.draft_lengths[row],
                a.top_k == nullptr ? 0 : a.top_k[row],
                number_of<A>(a.top_p, row),
                factor_of(temperature, A()),
                uint64_t(a.seeds[row]),
                a.offsets == nullptr ? 0 : uint64_t(a.offsets[row]),
                workspace + a.drafts * kDraftBytes};
  if (!in_range(s, temperature)) return false;
  switch (a.mode) {
    case kGreedyRule:
      verify_greedy(s);
      break;
    case kBlockRule:
      verify_by_block(s, reinterpret_cast<BlockPosition<A>*>(workspace));
      break;
    default:
      verify_by_token(s);
  }
  return true;
}

template <typename T>
int64_t verify(const VerifyDraftArgs& a, int threads) {
  const int64_t size = (a.drafts + 1) * a.vocab;
  const int64_t useful = a.batch * size / kElementsPerThread;
  const int64_t grain = size >= kElementsPerChunk ? 1 : kElementsPerChunk / size;
  int64_t first_bad = -1;
  parallel_workers(a.batch, useful < threads ? (useful < 1 ? 1 : int(useful)) : threads, grain,
                   [&](int worker, int64_t begin, int64_t end) {
                     char* workspace = static_cast<char*>(a.workspace) + worker * a.workspace_stride;
                     for (int64_t row = begin; row < end; ++row) {
                       if (verify_row<T>(a, row, workspace)) continue;
#pragma omp critical(gk_first_bad_row)
                       first_bad = first_bad < 0 || row < first_bad ? row : first_bad;
                     }
                   });
  return first_bad;
}

}  // namespace

int64_t verify_draft_cpu(const VerifyDraftArgs& args, int threads) {
  return by_dtype(args.dtype, [&](auto element) { return verify<decltype(element)>(args, threads); });
}

}  // namespace GK_ISA
}  // namespace grpo_kernels
