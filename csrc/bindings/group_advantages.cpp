// Binding of group_advantages.
#include "group_advantages/group_advantages.h"

#include "bindings/bindings.h"

namespace grpo_kernels {
namespace {

Grouping make_grouping(int64_t batch, int64_t group_size, Address order, Address sorted_ids) {
  return {batch, group_size, pointer<const int64_t>(order), pointer<const int64_t>(sorted_ids)};
}

int64_t group_advantages(Address rewards, int dtype, int64_t batch, int functions, int64_t group_size, Address order,
                         Address sorted_ids, Address weights, Address lengths, int baseline, int normalize_by, int aggregation,
                         int singleton, int correction, double eps, double batch_eps, Address scratch, Address advantages,
                         Address mean, Address std, int device, Address stream_or_threads) {
  GroupAdvantagesArgs args{};
  args.grouping = make_grouping(batch, group_size, order, sorted_ids);
  args.rewards = pointer<const void>(rewards);
  args.dtype = dtype;
  args.functions = functions;
  args.weights = pointer<const double>(weights);
  args.lengths = pointer<const double>(lengths);
  args.baseline = baseline;
  args.normalize_by = normalize_by;
  args.aggregation = aggregation;
  args.singleton = singleton;
  args.correction = correction;
  args.eps = eps;
  args.batch_eps = batch_eps;
  const Scratch memory(pointer<double>(scratch), [&] { return 2 * batch; });
  args.scratch = memory.data();
  args.advantages = pointer<void>(advantages);
  args.mean = pointer<void>(mean);
  args.std = pointer<void>(std);
  GK_LAUNCH(group_advantages, args, device, stream_or_threads);
}

int64_t informative_groups(Address rewards, int dtype, int64_t batch, int64_t group_size, Address order, Address sorted_ids,
                           Address mask, double tolerance, Address informative, int device, Address stream_or_threads) {
  InformativeGroupsArgs args{};
  args.grouping = make_grouping(batch, group_size, order, sorted_ids);
  args.rewards = pointer<const void>(rewards);
  args.dtype = dtype;
  args.mask = pointer<const uint8_t>(mask);
  args.tolerance = tolerance;
  args.informative = pointer<uint8_t>(informative);
  GK_LAUNCH(informative_groups, args, device, stream_or_threads);
}

int64_t group_rank(Address scores, int dtype, int64_t batch, int64_t group_size, Address order, Address sorted_ids,
                   Address valid, Address rank, int device, Address stream_or_threads) {
  GroupRankArgs args{};
  args.grouping = make_grouping(batch, group_size, order, sorted_ids);
  args.scores = pointer<const void>(scores);
  args.dtype = dtype;
  args.valid = pointer<const uint8_t>(valid);
  args.rank = pointer<int32_t>(rank);
  GK_LAUNCH(group_rank, args, device, stream_or_threads);
}

}  // namespace

void bind_group_advantages(py::module_& module) {
  module.def("group_advantages", &group_advantages);
  module.def("informative_groups", &informative_groups);
  module.def("group_rank", &group_rank);
}

}  // namespace grpo_kernels
