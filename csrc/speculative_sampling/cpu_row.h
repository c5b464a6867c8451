// The decision about one sequence: which drafts stay, and which token follows them.
#pragma once

#include "speculative_sampling/cpu_filter.h"
#include "speculative_sampling/cpu_race.h"

namespace grpo_kernels {
namespace GK_ISA {
namespace {

template <typename T>
struct Sequence {
  using A = typename Arithmetic<T>::type;

  const VerifyDraftArgs& args;
  int64_t row, length, top_k;
  double top_p;
  A factor;  // 1 / temperature
  uint64_t seed, offset;
  char* filter_space;

  const T* target(int64_t i) const {
    return static_cast<const T*>(args.target.data) + row * args.target.batch_stride + i * args.target.row_stride;
  }
  const T* draft(int64_t i) const {
    return static_cast<const T*>(args.draft.data) + row * args.draft.batch_stride + i * args.draft.row_stride;
  }
  bool certain_drafts() const { return args.draft.data == nullptr; }
  int64_t id(int64_t i) const {
    const int64_t at = row * args.drafts + i;
    return args.wide_ids ? static_cast<const int64_t*>(args.draft_ids)[at] : static_cast<const int32_t*>(args.draft_ids)[at];
  }

  Softmax<A> softmax(const T* x) const {
    Softmax<A> found = softmax_of(x, args.vocab, factor, args.mode == kGreedyRule);
    if (found.sound()) filter_row(x, args.vocab, top_k, top_p, FilterSpace<A>::of(filter_space, args.vocab), found);
    return found;
  }

  float uniform(int64_t i) const { return acceptance_uniform(seed, offset, i); }

  // log p(x) - log q(x) of draft i.
  double ratio(int64_t i, const Softmax<A>& p, const Softmax<A>* q) const {
    const double log_q = q == nullptr ? 0.0 : q->log_prob(to_arithmetic(draft(i)[id(i)]));
    return log_ratio(p.log_prob(to_arithmetic(target(i)[id(i)])), log_q);
  }

  // A block of max(weight p - q, 0) at position i.
  void residual(int64_t i, int64_t begin, int64_t count, const Softmax<A>& p, const Softmax<A>* q, double weight, A* w) const {
    target_weights(target(i) + begin, count, p, A(A(weight) * A(1.0 / p.sum)), w);
    if (q != nullptr) {
      subtract_draft(draft(i) + begin, count, *q, w);
    } else if (id(i) >= begin && id(i) < begin + count) {
      w[id(i) - begin] = A(0);
    }
  }

  double residual_mass(int64_t i, const Softmax<A>& p, const Softmax<A>* q, double weight) const {
    alignas(64) A w[kBlock];
    double mass = 0.0;
    for (int64_t begin = 0; begin < args.vocab; begin += kBlock) {
      const int64_t count = args.vocab - begin < kBlock ? args.vocab - begin : kBlock;
      residual(i, begin, count, p, q, weight, w);
      double sum = 0.0;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < count; ++j) sum += double(w[j]);
      mass += sum;
    }
    return mass;
  }

  int64_t draw_from_target(int64_t i, const Softmax<A>& p) const {
    return race<A>(args.vocab, seed, offset + uint64_t(i),
                   [&](int64_t begin, int64_t count, A* w) { target_weights(target(i) + begin, count, p, A(1.0 / p.sum), w); });
  }

  // In place of draft i, which was rejected.
  int64_t draw_residual(int64_t i, const Softmax<A>& p, const Softmax<A>* q, double weight) const {
    const int64_t token = race<A>(args.vocab, seed, offset + uint64_t(i),
                                  [&](int64_t begin, int64_t count, A* w) { residual(i, begin, count, p, q, weight, w); });
    return token >= 0 ? token : draw_from_target(i, p);
  }

  // --- outputs ---------------------------------------------------------------------------------------------------------------

  void emit(int64_t i, int64_t token, double log_prob) const {
    args.token_ids[row * (args.drafts + 1) + i] = token;
    static_cast<A*>(args.log_probs)[row * (args.drafts + 1) + i] = A(log_prob);
  }
  void emit(int64_t i, int64_t token, const Softmax<A>& p) const {
    emit(i, token, p.unfiltered_log_prob(to_arithmetic(target(i)[token])));
  }
  void end(int64_t accepted) const {
    args.num_accepted[row] = accepted;
    for (int64_t i = accepted + 1; i <= args.drafts; ++i) emit(i, -1, 0.0);
  }
  void finish(int64_t accepted, int64_t token, const Softmax<A>& p) const {
    emit(accepted, token, p);
    end(accepted);
  }
  // A row of logits at position `accepted` has no softmax.
  void fail(int64_t accepted) const {
    emit(accepted, -1, double(__builtin_nanf("")));
    end(accepted);
  }
};

template <typename T>
void verify_greedy(const Sequence<T>& s) {
  for (int64_t i = 0;; ++i) {
    const auto p = s.softmax(s.target(i));
    if (!p.sound()) return s.fail(i);
    if (i == s.length || s.id(i) != p.likeliest) return s.finish(i, p.likeliest, p);
    s.emit(i, p.likeliest, p);
  }
}

template <typename T>
void verify_by_token(const Sequence<T>& s) {
  for (int64_t i = 0;; ++i) {
    const auto p = s.softmax(s.target(i));
    if (!p.sound()) return s.fail(i);
    if (i == s.length) return s.finish(i, s.draw_from_target(i, p), p);
    const auto q = s.certain_drafts() ? p : s.softmax(s.draft(i));
    if (!q.sound()) return s.fail(i);
    const auto* draft = s.certain_drafts() ? nullptr : &q;
    if (!accepts(s.uniform(i), s.ratio(i, p, draft))) return s.finish(i, s.draw_residual(i, p, draft, 1.0), p);
    s.emit(i, s.id(i), p);
  }
}

// What the block rule remembers of a position.
template <typename A>
struct BlockPosition {
  Softmax<A> target, draft;
  double log_weight;  // of the drafts before it
};

// From the last draft down: the first threshold that is met decides, and the masses below are not needed.
template <typename T>
void verify_by_block(const Sequence<T>& s, BlockPosition<typename Arithmetic<T>::type>* positions) {
  double log_weight = 0.0;
  for (int64_t i = 0; i < s.length; ++i) {
    auto& at = positions[i];
    at.log_weight = log_weight;
    at.target = s.softmax(s.target(i));
    if (!at.target.sound()) return s.fail(0);
    if (!s.certain_drafts()) {
      at.draft = s.softmax(s.draft(i));
      if (!at.draft.sound()) return s.fail(0);
    }
    log_weight = next_log_weight(log_weight, s.ratio(i, at.target, s.certain_drafts() ? nullptr : &at.draft));
  }
  int64_t accepted = s.length;
  for (; accepted > 0; --accepted) {
    const double uniform = s.uniform(accepted - 1);
    if (accepted == s.length) {
      if (uniform < ::exp(log_weight)) break;
      continue;
    }
    const auto& at = positions[accepted];
    const double weight = ::exp(at.log_weight);
    const double mass = s.residual_mass(accepted, at.target, s.certain_drafts() ? nullptr : &at.draft, weight);
    if (uniform < block_threshold(mass, weight)) break;
  }
  for (int64_t i = 0; i < accepted; ++i) s.emit(i, s.id(i), positions[i].target);
  if (accepted == s.length) {
    const auto p = s.softmax(s.target(accepted));
    if (!p.sound()) return s.fail(accepted);
    return s.finish(accepted, s.draw_from_target(accepted, p), p);
  }
  const auto& at = positions[accepted];
  const auto* draft = s.certain_drafts() ? nullptr : &at.draft;
  s.finish(accepted, s.draw_residual(accepted, at.target, draft, ::exp(at.log_weight)), at.target);
}

}  // namespace
}  // namespace GK_ISA
}  // namespace grpo_kernels
