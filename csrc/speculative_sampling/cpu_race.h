// One token from weights: an exponential race over the vocabulary, in which almost nobody's exponential is formed.
#pragma once

#include "speculative_sampling/cpu_softmax.h"

namespace grpo_kernels {
namespace GK_ISA {
namespace {

constexpr int64_t kHeat = 128;  // tokens that are looked at one by one when one of them may win

// The words of tokens [begin, begin + kBlock) in the race at `place`.
inline void race_words(uint64_t seed, uint64_t place, int64_t begin, int64_t count, uint32_t* words) {
  const uint32_t first = uint32_t(begin / 4), low = uint32_t(place), high = uint32_t(place >> 32);
  const int32_t counters = int32_t((count + 3) / 4);
#pragma omp simd
  for (int32_t i = 0; i < counters; ++i) {
    uint32_t c0 = first + uint32_t(i), c1 = kRaceStream, c2 = low, c3 = high;
    philox(c0, c1, c2, c3, seed);
    words[4 * i] = c0;
    words[4 * i + 1] = c1;
    words[4 * i + 2] = c2;
    words[4 * i + 3] = c3;
  }
}

// The token that wins, the lowest id among equals; -1 where no weight is positive. fill(begin, count, w) writes the weights of
// a block.
//
// A token's time is not below its uniform's upper bits, so w / uniform bounds its score: only those that the bound lets pass
// the best score so far need a logarithm.
template <typename A, typename Fill>
int64_t race(int64_t vocab, uint64_t seed, uint64_t place, const Fill& fill) {
  alignas(64) A w[kBlock];
  alignas(64) uint32_t words[kBlock];
  double best = 0.0;
  int64_t winner = -1;
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int64_t count = vocab - begin < kBlock ? vocab - begin : kBlock;
    fill(begin, count, w);
    A largest = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < count; ++i) largest = largest < w[i] ? w[i] : largest;
    if (!(double(largest) > best * kLeastRaceTime)) continue;
    race_words(seed, place, begin, count, words);
    for (int64_t heat = 0; heat < count; heat += kHeat) {
      const int64_t end = heat + kHeat < count ? heat + kHeat : count;
      const A bound = A(best * 0.999999);  // rounding must not shut a winner out
      int hopeful = 0;
#pragma omp simd reduction(| : hopeful)
      for (int64_t i = heat; i < end; ++i) hopeful |= int(w[i] > A(0)) & int(A(uniform_of(words[i])) * bound <= w[i]);
      if (hopeful == 0) continue;
      for (int64_t i = heat; i < end; ++i) {
        if (!(w[i] > A(0)) || double(uniform_of(words[i])) * best * 0.999999 > double(w[i])) continue;
        const double score = double(w[i]) / race_time(words[i]);
        if (score > best) {
          best = score;
          winner = begin + i;
        }
      }
    }
  }
  return winner;
}

}  // namespace
}  // namespace GK_ISA
}  // namespace grpo_kernels
