#include <cstdlib>

#include "common/parallel.h"
#include "group_advantages/cpu_tile.h"

namespace grpo_kernels {
namespace GK_ISA {
namespace {

constexpr int64_t kSamplesPerChunk = 32768;  // below that a second thread costs more than it brings

// Calls body(begin, end) with the range of positions of every group.
template <typename Body>
void for_each_group(const Grouping& g, int threads, const Body& body) {
  if (g.order == nullptr) {
    const int64_t grain = g.group_size < kSamplesPerChunk ? kSamplesPerChunk / g.group_size : 1;
    parallel_rows(g.batch / g.group_size, threads, grain, [&](int64_t first, int64_t last) {
      for (int64_t group = first; group < last; ++group) body(group * g.group_size, (group + 1) * g.group_size);
    });
    return;
  }
  for (int64_t begin = 0; begin < g.batch;) {
    int64_t end = begin + 1;
    while (end < g.batch && g.sorted_ids[end] == g.sorted_ids[begin]) ++end;
    body(begin, end);
    begin = end;
  }
}

// The same where every value counts as often as its response, length(i), has tokens.
template <typename Length>
Statistics statistics_of_tokens(const double* values, int64_t count, int correction, const Length& length) {
  double pivot = 0.0, tokens = 0.0, shifted = 0.0, squared = 0.0;
  bool have_pivot = false;
  for (int64_t i = 0; i < count; ++i) {
    const double n = length(i);
    if (is_nan(values[i]) || n == 0.0) continue;
    if (!have_pivot) pivot = values[i];
    have_pivot = true;
    tokens += n;
    shifted += n * (values[i] - pivot);
  }
  const double mean = mean_from_sum(pivot, shifted, tokens);
  for (int64_t i = 0; i < count; ++i) {
    const double n = length(i);
    if (!is_nan(values[i]) && n != 0.0) squared += n * ((values[i] - mean) * (values[i] - mean));
  }
  return {mean, std_from_sum(squared, tokens, correction), tokens};
}

// What the rarer baselines compare with. Not inlined: with it, the usual ones take 8 % longer.
__attribute__((noinline)) Peer peer_of_group(const GroupAdvantagesArgs& a, int64_t begin, int64_t end, const double* values) {
  if (a.baseline == kBaselineLengthWeighted) {
    const Statistics weighted =
        statistics_of_tokens(values, end - begin, 0, [&](int64_t i) { return length_of(a, sample_at(a.grouping, begin + i)); });
    return {weighted.mean, weighted.count};
  }
  BestTwo two = no_best();
  for (int64_t i = 0; i < end - begin; ++i) {
    if (!is_nan(values[i])) two = merge(two, {values[i], lowest()});
  }
  return {two.second, 0.0};
}

// Centring of a group's values, which it raises to the floor, from the group's statistics.
Centring centring_of(const GroupAdvantagesArgs& a, int64_t begin, int64_t end, const Statistics& s, double* values) {
  const bool compares = a.baseline == kBaselineLengthWeighted || a.baseline == kBaselineSecondBest;
  const Centring c = make_centring(a, s, compares ? peer_of_group(a, begin, end, values) : Peer{0.0, 0.0});
  for (int64_t i = 0; i < end - begin && a.baseline == kBaselineSecondBest; ++i) values[i] = raised(c, values[i]);
  return c;
}

template <typename Out>
void store_group(const GroupAdvantagesArgs& a, int64_t begin, int64_t end, const Statistics& s, const Centring& c,
                 const double* values) {
  Out* advantages = static_cast<Out*>(a.advantages);
  Out* mean = static_cast<Out*>(a.mean);
  Out* std = static_cast<Out*>(a.std);
  const Out group_mean = Out(s.mean), group_std = Out(s.std);
  for (int64_t p = begin; p < end; ++p) mean[sample_at(a.grouping, p)] = group_mean;
  for (int64_t p = begin; p < end; ++p) std[sample_at(a.grouping, p)] = group_std;
  for (int64_t p = begin; p < end && values != nullptr; ++p) {
    const int64_t sample = sample_at(a.grouping, p);
    const double value = values[p - begin];
    const double result = scaled(centred(c, value), c.inverse);
    advantages[sample] = is_scored(a, sample, value) ? Out(result) : Out(0);
  }
}

// The z-scores of every function's rewards in their group, weighted and summed, in `sums` (by sample).
void sum_normalized(const GroupAdvantagesArgs& a, int64_t begin, int64_t end, double* values, double* sums) {
  for (int64_t p = begin; p < end; ++p) sums[sample_at(a.grouping, p)] = 0.0;
  for (int k = 0; k < a.functions; ++k) {
    for (int64_t p = begin; p < end; ++p) {
      values[p - begin] = load_value(a.rewards, a.dtype, sample_at(a.grouping, p) * a.functions + k);
    }
    Statistics s = statistics(values, end - begin, a.correction);
    apply_singleton(a, s);
    const Centring c = centring_of(a, begin, end, s, values);
    for (int64_t p = begin; p < end; ++p) {
      const double value = values[p - begin];
      if (is_nan(value)) continue;
      const double z = scaled(centred(c, value), c.inverse);
      sums[sample_at(a.grouping, p)] += a.weights == nullptr ? z : a.weights[k] * z;
    }
  }
}

// Scratch: [0, batch) total rewards of the group at hand, by position; [batch, 2 batch), where a batch statistic follows, the
// centred rewards or the sums of normalised rewards, by sample.
void advantages_of_group(const GroupAdvantagesArgs& a, int64_t begin, int64_t end) {
  double* values = a.scratch + begin;
  double* by_sample = a.scratch + a.grouping.batch;
  total_rewards(a, begin, end, values);
  Statistics s = statistics(values, end - begin, a.correction);
  apply_singleton(a, s);
  const Centring c = centring_of(a, begin, end, s, values);
  const bool finished = !needs_batch(a);
  if (a.dtype == kFloat64) {
    store_group<double>(a, begin, end, s, c, finished ? values : nullptr);
  } else {
    store_group<float>(a, begin, end, s, c, finished ? values : nullptr);
  }
  if (a.aggregation == kNormalizeThenSum) {
    sum_normalized(a, begin, end, values, by_sample);
  } else if (!finished) {
    for (int64_t p = begin; p < end; ++p) {
      by_sample[sample_at(a.grouping, p)] = centred(c, values[p - begin]);
    }
  }
}

void advantages_of_plain_groups(const GroupAdvantagesArgs& a, int threads) {
  const int64_t size = a.grouping.group_size;
  const int64_t tile = size * kTileGroups <= kTileSamples ? kTileGroups : (size < kTileSamples ? kTileSamples / size : 1);
  const int64_t grain = size < kSamplesPerChunk ? kSamplesPerChunk / size : 1;
  parallel_rows(a.grouping.batch / size, threads, grain, [&](int64_t begin, int64_t end) {
    double* values = a.scratch + begin * size;
    for (int64_t first = begin; first < end; first += tile) {
      const int64_t groups = end - first < tile ? end - first : tile;
      if (a.dtype == kFloat64) {
        advantages_of_tile<double>(a, first, groups, values);
      } else {
        advantages_of_tile<float>(a, first, groups, values);
      }
    }
  });
}

void normalize_batch(const GroupAdvantagesArgs& a) {
  const int64_t batch = a.grouping.batch;
  const bool whiten = whitens_batch(a);
  const double* by_sample = a.scratch + batch;
  double* live = a.scratch;  // what the batch statistic is taken over; NaN is left out
  for (int64_t i = 0; i < batch; ++i) {
    const double total = combined_reward(a, i);
    live[i] = whiten && is_scored(a, i, total) ? by_sample[i] : total;
  }
  const Statistics s = a.normalize_by == kNormalizeBatchTokens
                           ? statistics_of_tokens(live, batch, a.correction, [&](int64_t i) { return length_of(a, i); })
                           : statistics(live, batch, a.correction);
  const double inverse = inverse_scale_of_batch(a, s.std);
  for (int64_t i = 0; i < batch; ++i) {
    const double difference = whiten ? by_sample[i] - s.mean : by_sample[i];
    store_value(a.advantages, a.dtype, i, is_scored(a, i, combined_reward(a, i)) ? scaled(difference, inverse) : 0.0);
  }
}

// Merge sort of sample indices, best first: stable, and n log n for a batch that is one large group.
void sort_samples(const GroupRankArgs& a, int64_t* samples, int64_t* buffer, int64_t count) {
  for (int64_t width = 1; width < count; width *= 2) {
    for (int64_t low = 0; low < count; low += 2 * width) {
      const int64_t middle = low + width < count ? low + width : count;
      const int64_t high = low + 2 * width < count ? low + 2 * width : count;
      int64_t left = low, right = middle;
      for (int64_t out = low; out < high; ++out) {
        const bool take_left =
            left < middle && (right >= high || !ranks_before(load_value(a.scores, a.dtype, samples[right]), samples[right],
                                                             load_value(a.scores, a.dtype, samples[left]), samples[left]));
        buffer[out] = take_left ? samples[left++] : samples[right++];
      }
    }
    memcpy(samples, buffer, size_t(count) * sizeof(int64_t));
  }
}

}  // namespace

int64_t group_advantages_cpu(const GroupAdvantagesArgs& a, int threads) {
  if (is_plain(a)) {
    advantages_of_plain_groups(a, threads);
    return -1;
  }
  for_each_group(a.grouping, threads, [&](int64_t begin, int64_t end) { advantages_of_group(a, begin, end); });
  if (needs_batch(a)) normalize_batch(a);
  return -1;
}

int64_t informative_groups_cpu(const InformativeGroupsArgs& a, int threads) {
  for_each_group(a.grouping, threads, [&](int64_t begin, int64_t end) {
    double low = 0.0, high = 0.0;
    bool any = false;
    for (int64_t p = begin; p < end; ++p) {
      const int64_t sample = sample_at(a.grouping, p);
      const double value = load_value(a.rewards, a.dtype, sample);
      if (is_nan(value) || (a.mask != nullptr && !a.mask[sample])) continue;
      low = !any || value < low ? value : low;
      high = !any || value > high ? value : high;
      any = true;
    }
    for (int64_t p = begin; p < end; ++p) a.informative[sample_at(a.grouping, p)] = any && high - low > a.tolerance;
  });
  return -1;
}

int64_t group_rank_cpu(const GroupRankArgs& a, int threads) {
  // Position p of a group owns slot p of both arrays, so that groups can be sorted in parallel.
  int64_t* samples = static_cast<int64_t*>(malloc(size_t(2 * a.grouping.batch + 1) * sizeof(int64_t)));
  if (samples == nullptr) return 0;
  int64_t* buffer = samples + a.grouping.batch;
  for_each_group(a.grouping, threads, [&](int64_t begin, int64_t end) {
    int64_t count = 0;
    for (int64_t p = begin; p < end; ++p) {
      const int64_t sample = sample_at(a.grouping, p);
      a.rank[sample] = -1;
      if (is_nan(load_value(a.scores, a.dtype, sample)) || (a.valid != nullptr && !a.valid[sample])) continue;
      samples[begin + count++] = sample;
    }
    sort_samples(a, samples + begin, buffer + begin, count);
    for (int64_t i = 0; i < count; ++i) a.rank[samples[begin + i]] = int32_t(i);
  });
  free(samples);
  return -1;
}

}  // namespace GK_ISA
}  // namespace grpo_kernels
