// top_k and top_p as thresholds, without sorting: a histogram over the upper bits of the logits' ordered keys finds the bin in
// which the threshold lies; the keys of that bin go on to the next bits.
#pragma once

#include "speculative_sampling/cpu_softmax.h"

namespace grpo_kernels {
namespace GK_ISA {
namespace {

template <typename A>
struct KeyOf {
  using type = uint32_t;
};
template <>
struct KeyOf<double> {
  using type = uint64_t;
};

// A thread's room: a key and a mass for each token.
template <typename A>
struct FilterSpace {
  using Key = typename KeyOf<A>::type;
  Key* keys;
  A* masses;

  static FilterSpace of(char* base, int64_t vocab) {
    return {reinterpret_cast<Key*>(base), reinterpret_cast<A*>(base + filter_bytes(vocab, int64_t(sizeof(A))))};
  }
};

constexpr int kRadixBits = 11;

// The largest key at which the masses of the keys that are not smaller reach `wanted`; the smallest key if rounding keeps them
// from it. kMass: masses, else each key counts 1. Keys and masses are moved about.
template <bool kMass, typename A>
A threshold_of(const FilterSpace<A>& space, int64_t count, double wanted) {
  using Key = typename KeyOf<A>::type;
  double bins[1 << kRadixBits];
  double above = 0.0;
  for (int left = int(sizeof(Key)) * 8; left > 0;) {
    const int bits = left < kRadixBits ? left : kRadixBits;
    left -= bits;
    const Key mask = (Key(1) << bits) - 1;
    for (int64_t bin = 0; bin < int64_t(1) << bits; ++bin) bins[bin] = 0.0;
    for (int64_t i = 0; i < count; ++i) bins[space.keys[i] >> left & mask] += kMass ? double(space.masses[i]) : 1.0;
    Key chosen = 0;
    double reached = above;
    for (int64_t bin = int64_t(mask); bin >= 0; --bin) {
      if (bins[bin] == 0.0) continue;
      chosen = Key(bin);
      above = reached;
      reached += bins[bin];
      if (reached >= wanted) break;
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
  return value_of(space.keys[0]);
}

// The keys, and where wanted the masses, of what the row's threshold keeps. Returns their number.
template <bool kMass, typename T, typename A>
int64_t collect(const T* x, int64_t vocab, const Softmax<A>& row, const FilterSpace<A>& space) {
  int64_t found = 0;
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int64_t count = vocab - begin < kBlock ? vocab - begin : kBlock;
    int64_t kept = 0;
#pragma omp simd reduction(+ : kept)
    for (int64_t i = 0; i < count; ++i) {
      const A value = to_arithmetic(x[begin + i]);
      space.keys[found + i] = ordered_key(value);
      if (kMass) space.masses[found + i] = exp_or_zero((value - row.max) * row.factor);
      kept += value >= row.threshold;
    }
    if (kept == count) {
      found += count;
      continue;
    }
    const auto lowest = ordered_key(row.threshold);
    const int64_t first = found;
    for (int64_t i = first; kept > 0 && i < first + count; ++i) {
      const auto key = space.keys[i];
      space.keys[found] = key;
      if (kMass) space.masses[found] = space.masses[i];
      found += key >= lowest;
    }
  }
  return found;
}

// Narrows the row to what the filters keep. top_k <= 0 or >= V, and top_p >= 1, keep everything.
template <typename T, typename A>
void filter_row(const T* x, int64_t vocab, int64_t top_k, double top_p, const FilterSpace<A>& space, Softmax<A>& row) {
  if (top_k > 0 && top_k < vocab) {
    row.threshold = threshold_of<false>(space, collect<false>(x, vocab, row, space), double(top_k));
    row.sum = kept_sum(x, vocab, row);
  }
  if (top_p < 1.0) {
    row.threshold = threshold_of<true>(space, collect<true>(x, vocab, row, space), top_p * row.sum);
    row.sum = kept_sum(x, vocab, row);
  }
}

}  // namespace
}  // namespace GK_ISA
}  // namespace grpo_kernels
