// top_k and top_p as thresholds, without sorting the vocabulary.
//
// The maxima of groups of logits bound the threshold from below, and so name the few groups that may hold what is kept. Of
// those a histogram over the upper bits of the logits' ordered keys finds the bin in which the threshold lies; the keys of that
// bin go on to the next bits, and the last few are sorted.
#pragma once

#include "speculative_sampling/cpu_softmax.h"
#include "speculative_sampling/workspace.h"

namespace grpo_kernels {
namespace GK_ISA {
namespace {

template <typename A>
struct KeyOf {
  using type = uint32_t;
  static constexpr double kEpsilon = 1.1920928955078125e-7;
};
template <>
struct KeyOf<double> {
  using type = uint64_t;
  static constexpr double kEpsilon = 2.220446049250313e-16;
};

// A thread's room: keys and masses of tokens, and the maxima of groups.
template <typename A>
struct FilterSpace {
  using Key = typename KeyOf<A>::type;
  Key* keys;
  A* masses;
  A* maxima;

  static FilterSpace of(char* base, int64_t vocab) {
    const int64_t bytes = filter_bytes(vocab, int64_t(sizeof(A)));
    return {reinterpret_cast<Key*>(base), reinterpret_cast<A*>(base + bytes), reinterpret_cast<A*>(base + 2 * bytes)};
  }
};

constexpr int kRadixBits = 11;
constexpr int64_t kFew = 48;  // are sorted

// The threshold of a few keys: see threshold_of.
template <bool kMass, typename A>
A threshold_of_few(const FilterSpace<A>& space, int64_t count, double above, double wanted) {
  using Key = typename KeyOf<A>::type;
  for (int64_t i = 1; i < count; ++i) {
    const Key key = space.keys[i];
    const A mass = kMass ? space.masses[i] : A(1);
    int64_t place = i;
    for (; place > 0 && space.keys[place - 1] < key; --place) {
      space.keys[place] = space.keys[place - 1];
      if (kMass) space.masses[place] = space.masses[place - 1];
    }
    space.keys[place] = key;
    if (kMass) space.masses[place] = mass;
  }
  int64_t last = 0;
  for (int64_t i = 0; i < count && above < wanted; ++i) {
    above += kMass ? double(space.masses[i]) : 1.0;
    last = i;
  }
  return value_of(space.keys[last]);
}

// The largest key at which the masses of the keys that are not smaller reach `wanted`; the smallest with a mass if rounding
// keeps them from it. kMass: masses, else each key counts 1. Keys and masses are moved about.
template <bool kMass, typename A>
A threshold_of(const FilterSpace<A>& space, int64_t count, double wanted) {
  using Key = typename KeyOf<A>::type;
  double bins[1 << kRadixBits];
  double above = 0.0;
  for (int left = int(sizeof(Key)) * 8; left > 0 && count > kFew;) {
    const int bits = left < kRadixBits ? left : kRadixBits;
    left -= bits;
    const Key mask = (Key(1) << bits) - 1;
    for (int64_t bin = 0; bin < int64_t(1) << bits; ++bin) bins[bin] = 0.0;
    for (int64_t i = 0; i < count; ++i) bins[space.keys[i] >> left & mask] += kMass ? double(space.masses[i]) : 1.0;
    Key chosen = 0;
    double reached = above;
    for (int64_t bin = int64_t(mask); bin >= 0 && reached < wanted; --bin) {
      if (bins[bin] == 0.0) continue;
      chosen = Key(bin);
      above = reached;
      reached += bins[bin];
    }
    int64_t found = 0;
    for (int64_t i = 0; i < count; ++i) {
      const Key key = space.keys[i];
      space.keys[found] = key;
      if (kMass) space.masses[found] = space.masses[i];
      found += (key >> left & mask) == chosen;
    }
    count = found;
  }
  return threshold_of_few<kMass>(space, count < kFew ? count : kFew, above, wanted);
}

template <typename T, typename A>
void group_maxima(const T* x, int64_t vocab, A* maxima) {
  for (int64_t group = 0; group * kFilterGroup < vocab; ++group) {
    const int64_t begin = group * kFilterGroup, count = vocab - begin < kFilterGroup ? vocab - begin : kFilterGroup;
    A largest = -infinity<A>();
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < count; ++i) {
      const A value = to_arithmetic(x[begin + i]);
      largest = largest < value ? value : largest;
    }
    maxima[group] = largest;
  }
}

// The keys, and where wanted the masses, of what is not below `lowest`. Returns their number.
template <bool kMass, typename T, typename A>
int64_t collect(const T* x, int64_t vocab, const Softmax<A>& row, A lowest, const FilterSpace<A>& space) {
  alignas(64) typename KeyOf<A>::type keys[kFilterGroup];
  alignas(64) A masses[kFilterGroup];
  const auto lowest_key = ordered_key(lowest);
  int64_t found = 0;
  for (int64_t group = 0; group * kFilterGroup < vocab; ++group) {
    if (space.maxima[group] < lowest) continue;
    const int64_t begin = group * kFilterGroup, count = vocab - begin < kFilterGroup ? vocab - begin : kFilterGroup;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const A value = to_arithmetic(x[begin + i]);
      keys[i] = ordered_key(value);
      if (kMass) masses[i] = exp_or_zero((value - row.max) * row.factor);
    }
    for (int64_t i = 0; i < count; ++i) {
      space.keys[found] = keys[i];
      if (kMass) space.masses[found] = masses[i];
      found += keys[i] >= lowest_key;
    }
  }
  return found;
}

// The sum over what the row's threshold keeps.
template <typename T, typename A>
double kept_sum(const T* x, int64_t vocab, const Softmax<A>& row, const A* maxima) {
  alignas(64) A y[kFilterGroup];
  double sum = 0.0;
  for (int64_t group = 0; group * kFilterGroup < vocab; ++group) {
    if (maxima[group] < row.threshold) continue;
    const int64_t begin = group * kFilterGroup;
    load_block(x + begin, vocab - begin < kFilterGroup ? vocab - begin : kFilterGroup, y);
    sum += sum_strip(y, kFilterGroup / 2, row.max, row.factor, row.threshold);
  }
  return sum;
}

// A value that is not above the k-th largest: the k-th largest maximum.
template <typename A>
A bound_of_top_k(const FilterSpace<A>& space, int64_t vocab, int64_t top_k) {
  const int64_t groups = (vocab + kFilterGroup - 1) / kFilterGroup;
  if (top_k > groups) return -infinity<A>();
  for (int64_t group = 0; group < groups; ++group) space.keys[group] = ordered_key(space.maxima[group]);
  return threshold_of<false>(space, groups, double(top_k));
}

// A value below which top_p keeps nothing: V tokens of at most (1 - top_p) sum / V leave top_p of the mass above them.
template <typename A>
A bound_of_top_p(const Softmax<A>& row, int64_t vocab, double top_p) {
  const double exponent = ::log((1.0 - top_p) * row.sum / double(vocab)) - 1e-3;
  const double bound = double(row.max) + exponent / double(row.factor);
  const double largest = double(row.max) < 0.0 ? -double(row.max) : double(row.max);
  const A lowered = A(bound - 2.0 * KeyOf<A>::kEpsilon * (largest + (bound < 0.0 ? -bound : bound)));
  return lowered > row.threshold ? lowered : row.threshold;
}

// Narrows the row to what the filters keep. top_k <= 0 or >= V, and top_p = 1, keep everything.
template <typename T, typename A>
void filter_row(const T* x, int64_t vocab, int64_t top_k, double top_p, const FilterSpace<A>& space, Softmax<A>& row) {
  const bool by_rank = top_k > 0 && top_k < vocab;
  if (!by_rank && top_p >= 1.0) return;
  group_maxima(x, vocab, space.maxima);
  if (by_rank) {
    const A bound = bound_of_top_k(space, vocab, top_k);
    row.threshold = threshold_of<false>(space, collect<false>(x, vocab, row, bound, space), double(top_k));
    row.sum = kept_sum(x, vocab, row, space.maxima);
  }
  if (top_p < 1.0) {
    const A bound = bound_of_top_p(row, vocab, top_p);
    row.threshold = threshold_of<true>(space, collect<true>(x, vocab, row, bound, space), top_p * row.sum);
    row.sum = kept_sum(x, vocab, row, space.maxima);
  }
}

}  // namespace
}  // namespace GK_ISA
}  // namespace grpo_kernels
