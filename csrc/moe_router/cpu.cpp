// Forward: a token's logits are read once, into the first-level cache. Tasks of a fixed number of tokens leave integer counts,
// which commute, and sums over columns in a place of their own, which one thread adds up in order. Backward: only the chosen
// experts' gradients are written into zeros, unless the whole row has one.

#include "common/parallel.h"
#include "moe_router/cpu_route.h"
#include "moe_router/workspace.h"

namespace grpo_kernels {
namespace GK_ISA {
namespace router_kernels {
namespace {

constexpr int64_t kElementsPerThread = 32768;  // below that a second thread costs more than it brings

int threads_for(const RouterRows& rows, int threads) {
  const int64_t useful = rows.tokens * rows.experts / kElementsPerThread;
  return useful < threads ? (useful < 1 ? 1 : int(useful)) : threads;
}

bool has_columns(const RouterOptions& o) { return o.losses[router::kAuxLoss] || o.losses[router::kSequenceLoss]; }

uint32_t* sequence_lengths(const MoeRouterArgs& a) { return a.counters + router::kFirstSequence; }
uint32_t* sequence_counts(const MoeRouterArgs& a) { return sequence_lengths(a) + a.sequences.count; }

// --- forward
// ------------------------------------------------------------------------------------------------------------------

// What a task has counted, of integers: merged in any order.
struct Counts {
  int32_t per_expert[router::kMaxExperts];
  int64_t live, mismatches;
};

void add_counts(int64_t live, const int32_t* from, int experts, uint32_t* length, uint32_t* to) {
#pragma omp critical(gk_moe_router_counts)
  {
    *length += uint32_t(live);
    for (int i = 0; i < experts; ++i) to[i] += uint32_t(from[i]);
  }
}

template <typename T, typename A>
struct Forward {
  using Rank = typename Order<A>::Rank;
  const MoeRouterArgs& a;
  bool by_logit, every_score, columns;

  explicit Forward(const MoeRouterArgs& args)
      : a(args),
        by_logit(args.bias == nullptr && args.n_group == 1),
        every_score((!by_logit && args.options.scoring != router::kTopkSoftmax) ||
                    (args.options.scoring == router::kSoftmax && !args.options.normalize)),
        columns(has_columns(args.options)) {}

  // Routes one live token. Returns false where its replay is faulty.
  bool route(int64_t token, Row<A>& row, Counts& counts, int32_t* unbiased, bool& broken) const {
    const int top_k = a.rows.top_k;
    alignas(64) Rank ranks[router::kMaxExperts];
    int32_t* ids = a.topk_ids + token * top_k;
    load_row<T>(a.rows, token, row);
    if (every_score || columns) all_scores<false>(a.options.scoring, row);
    if (unbiased != nullptr && !by_logit) {
      rank_row(a, row, true, ranks);
      best_experts<A>(ranks, row.experts, top_k, unbiased);
    }
    rank_row(a, row, by_logit, ranks);
    if (a.n_group > 1) drop_groups<A>(a, ranks);
    best_experts<A>(ranks, row.experts, top_k, ids);
    if (unbiased != nullptr && by_logit) memcpy(unbiased, ids, size_t(top_k) * sizeof(int32_t));
    bool differs = false;
    if (a.replay != nullptr && !replay_row(a, token, ids, differs)) return false;
    counts.mismatches += differs;
    ++counts.live;
    for (int k = 0; k < top_k; ++k) ++counts.per_expert[ids[k]];
    broken = weigh_row(a.options, row, ids, top_k, static_cast<A*>(a.topk_weights) + token * top_k);
    return true;
  }

  // Adds a token's share to the z-loss and, where there are balance losses, its p to the sums over columns.
  void add_losses(Row<A>& row, bool broken, double& z_loss, double* sums) const {
    const double poison = broken ? __builtin_nan("") : 1.0;
    if (sums != nullptr) {
      const A factor = probability_factor(a.options.scoring, row.sum) * A(poison);
#pragma omp simd
      for (int i = 0; i < row.experts; ++i) sums[i] += double(row.score[i] * factor);
    }
    if (!a.options.losses[router::kZLoss]) return;
    if (!is_softmax(a.options.scoring) || !(every_score || columns)) softmax_terms(row);
    const double log_sum = double(log_sum_exp(row.max, row.sum)) * poison;
    z_loss += log_sum * log_sum;
  }

  // Tokens of one task and, with the sequence-wise loss, one sequence. Returns the first faulty one, or -1.
  int64_t run(int64_t begin, int64_t end, int64_t sequence, double& z_loss, double* sums) const {
    const int top_k = a.rows.top_k;
    const bool by_sequence = a.options.losses[router::kSequenceLoss];
    Row<A> row;
    Counts counts, chosen;
    memset(&counts, 0, sizeof(counts));
    if (by_sequence) memset(&chosen, 0, sizeof(chosen));
    if (sums != nullptr) memset(sums, 0, size_t(a.rows.experts) * sizeof(double));
    int64_t faulty = -1;
    for (int64_t token = begin; token < end; ++token) {
      if (a.mask != nullptr && !a.mask[token]) {
        for (int64_t slot = token * top_k; slot < (token + 1) * top_k; ++slot) {
          a.topk_ids[slot] = -1;
          static_cast<A*>(a.topk_weights)[slot] = 0;
        }
        continue;
      }
      int32_t unbiased[router::kMaxTopK];
      bool broken = false;
      if (!route(token, row, counts, by_sequence ? unbiased : nullptr, broken)) {
        faulty = faulty < 0 ? token : faulty;
        continue;
      }
      for (int k = 0; by_sequence && k < top_k; ++k) ++chosen.per_expert[unbiased[k]];
      add_losses(row, broken, z_loss, sums);
    }
    add_counts(counts.live, counts.per_expert, a.rows.experts, a.counters + router::kLiveTokens,
               reinterpret_cast<uint32_t*>(a.per_expert));
    if (by_sequence) {
      add_counts(counts.live, chosen.per_expert, a.rows.experts, sequence_lengths(a) + sequence,
                 sequence_counts(a) + sequence * a.rows.experts);
    }
    if (counts.mismatches > 0) {
#pragma omp atomic
      a.counters[router::kMismatches] += uint32_t(counts.mismatches);
    }
    return faulty;
  }
};

// Calls body(begin, end, sequence, stretch) for each stretch of a task within one sequence. Stretches are numbered so that no
// two are equal: on the way through the tokens each new one has a higher task or a higher sequence.
template <typename Body>
void for_each_stretch(const MoeRouterArgs& a, int64_t task, const Body& body) {
  const int64_t size = tokens_per_task(a.rows.tokens, a.rows.experts);
  const int64_t last = (task + 1) * size < a.rows.tokens ? (task + 1) * size : a.rows.tokens;
  if (!a.options.losses[router::kSequenceLoss] || a.sequences.cu_seqlens == nullptr) {
    body(task * size, last, int64_t(0), task);
    return;
  }
  for (int64_t begin = task * size; begin < last;) {
    const int64_t sequence = sequence_of(a.sequences, begin);
    const int64_t end = sequence_end(a.sequences, sequence + 1);
    body(begin, end < last ? end : last, sequence, task + sequence);
    begin = end;
  }
}

// Columns of the balance losses, from the counts.
template <typename A>
void fill_balance(const MoeRouterArgs& a, int64_t live) {
  const int experts = a.rows.experts, top_k = a.rows.top_k;
  A* out = static_cast<A*>(a.balance);
  if (a.options.losses[router::kAuxLoss]) {
    for (int i = 0; i < experts; ++i) *out++ = A(aux_column(a.per_expert[i], experts, top_k, live));
  }
  if (!a.options.losses[router::kSequenceLoss]) return;
  const uint32_t* lengths = sequence_lengths(a);
  const uint32_t* counts = sequence_counts(a);
  int64_t nonempty = 0;
  for (int64_t s = 0; s < a.sequences.count; ++s) nonempty += lengths[s] > 0;
  for (int64_t s = 0; s < a.sequences.count; ++s) {
    for (int i = 0; i < experts; ++i) {
      *out++ = A(sequence_column(counts[s * experts + i], experts, top_k, lengths[s], nonempty));
    }
  }
}

// The losses, from the sums that the tasks left, in the order of the tasks.
template <typename A>
void finish(const MoeRouterArgs& a) {
  const int64_t live = a.counters[router::kLiveTokens];
  const int experts = a.rows.experts;
  const int64_t count = tasks(a.rows.tokens, experts);
  *a.live_tokens = int32_t(live);
  *a.mismatch = int32_t(a.counters[router::kMismatches]);
  fill_balance<A>(a, live);
  const bool aux = a.options.losses[router::kAuxLoss], by_sequence = a.options.losses[router::kSequenceLoss];
  const A* aux_row = static_cast<const A*>(a.balance);
  const A* sequence_rows = aux_row + (aux ? experts : 0);
  double losses[router::kLosses] = {0.0, 0.0, 0.0};
  for (int64_t task = 0; task < count; ++task) {
    losses[router::kZLoss] += a.workspace[task];
    if (!aux && !by_sequence) continue;
    for_each_stretch(a, task, [&](int64_t, int64_t, int64_t sequence, int64_t stretch) {
      const double* sums = a.workspace + count + stretch * experts;
      for (int i = 0; i < experts; ++i) {
        if (aux) losses[router::kAuxLoss] += double(aux_row[i]) * sums[i];
        if (by_sequence) losses[router::kSequenceLoss] += double(sequence_rows[sequence * experts + i]) * sums[i];
      }
    });
  }
  losses[router::kZLoss] /= at_least_one(live);
  for (int i = 0; i < router::kLosses; ++i) static_cast<A*>(a.losses)[i] = A(a.options.losses[i] ? losses[i] : 0.0);
}

// The first sequence that does not rise from where the last one ended, or -1.
int64_t bad_sequence(const MoeRouterArgs& a) {
  const RouterSequences& s = a.sequences;
  if (!a.options.losses[router::kSequenceLoss] || s.cu_seqlens == nullptr) return -1;
  if (sequence_end(s, 0) != 0) return 0;
  for (int64_t i = 0; i < s.count; ++i) {
    if (sequence_end(s, i) > sequence_end(s, i + 1)) return i;
  }
  return sequence_end(s, s.count) == a.rows.tokens ? -1 : (s.count > 0 ? s.count - 1 : 0);
}

template <typename T>
int64_t forward(const MoeRouterArgs& a, int threads) {
  using A = typename Arithmetic<T>::type;
  const int64_t wrong = bad_sequence(a);
  if (wrong >= 0) return a.rows.tokens + wrong;
  memset(a.per_expert, 0, size_t(a.rows.experts) * sizeof(int32_t));
  memset(a.counters, 0, size_t(counters_size(a.rows.experts, a.sequences.count, a.options.losses)) * sizeof(uint32_t));
  const int64_t count = tasks(a.rows.tokens, a.rows.experts);
  const Forward<T, A> pass(a);
  int64_t first_bad = -1;
  parallel_rows(count, threads_for(a.rows, threads), 1, [&](int64_t task, int64_t) {
    double z_loss = 0.0;
    for_each_stretch(a, task, [&](int64_t begin, int64_t end, int64_t sequence, int64_t stretch) {
      double* sums = pass.columns ? a.workspace + count + stretch * a.rows.experts : nullptr;
      const int64_t faulty = pass.run(begin, end, sequence, z_loss, sums);
      if (faulty < 0) return;
#pragma omp critical(gk_moe_router_faulty)
      first_bad = first_bad < 0 || faulty < first_bad ? faulty : first_bad;
    });
    a.workspace[task] = z_loss;
  });
  if (first_bad < 0) finish<A>(a);
  return first_bad;
}

// --- backward
// -----------------------------------------------------------------------------------------------------------------

template <typename T, typename A>
struct Backward {
  const MoeRouterBackwardArgs& a;
  bool plain_softmax, columns;
  A grad_z, grad_aux, grad_sequence;

  explicit Backward(const MoeRouterBackwardArgs& args)
      : a(args),
        plain_softmax(args.options.scoring == router::kSoftmax && !args.options.normalize && args.grad_weights != nullptr),
        columns(has_columns(args.options) && args.grad_losses != nullptr),
        grad_z(grad_of(router::kZLoss)),
        grad_aux(grad_of(router::kAuxLoss)),
        grad_sequence(grad_of(router::kSequenceLoss)) {}

  A grad_of(router::Loss loss) const {
    return a.grad_losses != nullptr && a.options.losses[loss] ? static_cast<const A*>(a.grad_losses)[loss] : A(0);
  }

  bool asks_z_loss() const { return a.options.losses[router::kZLoss] && a.grad_losses != nullptr; }
  bool is_dense() const { return plain_softmax || columns || asks_z_loss(); }

  // v: the gradient of the balance losses by a token's p.
  void balance_row(int64_t sequence, A* v) const {
    const int experts = a.rows.experts;
    const A* aux = a.options.losses[router::kAuxLoss] ? static_cast<const A*>(a.balance) : nullptr;
    const A* rows = static_cast<const A*>(a.balance) + (aux == nullptr ? 0 : experts);
    const A* own = a.options.losses[router::kSequenceLoss] && sequence >= 0 ? rows + sequence * experts : nullptr;
    for (int i = 0; i < experts; ++i) v[i] = balance_gradient(aux, grad_aux, own, grad_sequence, i);
  }

  // grad = what the balance losses give. Leaves a softmax's terms in the row if the scores are one.
  void balance_losses(int64_t token, Row<A>& row, A* grad) const {
    alignas(64) A v[router::kMaxExperts];
    const int scoring = a.options.scoring;
    balance_row(a.options.losses[router::kSequenceLoss] ? sequence_of(a.sequences, token) : 0, v);
    all_scores<true>(scoring, row);
    const A factor = probability_factor(scoring, row.sum);
    A dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int i = 0; i < row.experts; ++i) dot += v[i] * (row.score[i] * factor);
    const A* slope = is_softmax(scoring) ? row.score : row.slope;
#pragma omp simd
    for (int i = 0; i < row.experts; ++i) grad[i] = (slope[i] * factor) * (v[i] - dot);
  }

  // Everything that reaches all of a row's logits.
  void dense(int64_t token, A dot, Row<A>& row, A* grad) const {
    const bool softmax = is_softmax(a.options.scoring);
    if (columns) {
      balance_losses(token, row, grad);
    } else {
      for (int i = 0; i < row.experts; ++i) grad[i] = 0;
    }
    if (!plain_softmax && !asks_z_loss()) return;
    if (!columns || !softmax) softmax_terms(row);
    A factor = plain_softmax ? -dot : A(0);
    if (asks_z_loss()) factor += z_loss_factor(grad_z, log_sum_exp(row.max, row.sum), *a.live_tokens);
    const A inverse = A(1) / row.sum;
#pragma omp simd
    for (int i = 0; i < row.experts; ++i) grad[i] = multiply_add(row.score[i] * inverse, factor, grad[i]);
  }

  // What the weights give the chosen experts.
  void chosen(int64_t token, A dot, const T* x, A* at) const {
    const int top_k = a.rows.top_k;
    const int32_t* ids = a.topk_ids + token * top_k;
    const A* w = static_cast<const A*>(a.topk_weights) + token * top_k;
    const A* g = static_cast<const A*>(a.grad_weights) + token * top_k;
    alignas(64) A slopes[router::kMaxTopK] = {};
    double sum = 0.0;
    if (!is_softmax(a.options.scoring)) {
      alignas(64) A z[router::kMaxTopK], score[router::kMaxTopK];
      const int count = padded(top_k, 8);
      for (int k = 0; k < count; ++k) z[k] = to_arithmetic(x[ids[k < top_k ? k : 0]]);
      chosen_scores(a.options.scoring, count, z, score, slopes);
      for (int k = 0; k < top_k; ++k) sum += double(score[k]);
    }
    for (int k = 0; k < top_k; ++k) at[k] = chosen_gradient(a.options, g[k], w[k], dot, slopes[k], A(sum));
  }

  // <g, w> over the slots. Where weights add up to the scaling they do so up to rounding, and its use cancels.
  A slots_dot(const A* g, const A* w) const {
    double dot = 0.0, total = 0.0;
    for (int k = 0; k < a.rows.top_k; ++k) {
      dot += double(g[k]) * double(w[k]);
      total += double(w[k]);
    }
    return A(over_chosen(a.options) ? dot * (double(a.options.scaling) / total) : dot);
  }

  void run(int64_t token) const {
    const int top_k = a.rows.top_k, experts = a.rows.experts;
    const T* x = static_cast<const T*>(a.rows.logits) + token * a.rows.row_stride;
    T* out = static_cast<T*>(a.grad_logits) + token * experts;
    const int32_t* ids = a.topk_ids + token * top_k;
    const A* w = static_cast<const A*>(a.topk_weights) + token * top_k;
    const bool masked = ids[0] < 0, broken = !masked && w[0] != w[0];
    const bool all = !masked && !broken && is_dense();
    if (!all) {
      T fill;
      from_arithmetic(A(broken ? __builtin_nanf("") : 0.0f), fill);
      for (int i = 0; i < experts; ++i) out[i] = fill;
      if (masked || broken) return;
    }
    A at[router::kMaxTopK] = {};
    A dot = 0;
    if (a.grad_weights != nullptr) {
      dot = slots_dot(static_cast<const A*>(a.grad_weights) + token * top_k, w);
      chosen(token, dot, x, at);
    }
    if (!all) {
      for (int k = 0; k < top_k; ++k) from_arithmetic(at[k], out[ids[k]]);
      return;
    }
    Row<A> row;
    alignas(64) A grad[router::kMaxExperts];
    load_row<T>(a.rows, token, row);
    dense(token, dot, row, grad);
    for (int k = 0; k < top_k; ++k) grad[ids[k]] += at[k];
    for (int i = 0; i < experts; ++i) from_arithmetic(grad[i], out[i]);
  }
};

template <typename T>
int64_t backward(const MoeRouterBackwardArgs& a, int threads) {
  const Backward<T, typename Arithmetic<T>::type> pass(a);
  const int64_t grain = tokens_per_task(a.rows.tokens, a.rows.experts);
  parallel_rows(a.rows.tokens, threads_for(a.rows, threads), grain, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) pass.run(token);
  });
  return -1;
}

}  // namespace
}  // namespace router_kernels

int64_t moe_router_cpu(const MoeRouterArgs& args, int threads) {
  return by_dtype(args.rows.dtype, [&](auto element) { return router_kernels::forward<decltype(element)>(args, threads); });
}

int64_t moe_router_backward_cpu(const MoeRouterBackwardArgs& args, int threads) {
  return by_dtype(args.rows.dtype, [&](auto element) { return router_kernels::backward<decltype(element)>(args, threads); });
}

}  // namespace GK_ISA
}  // namespace grpo_kernels
