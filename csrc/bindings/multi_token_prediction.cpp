// Binding of mtp_targets.
#include "multi_token_prediction/multi_token_prediction.h"

#include "bindings/bindings.h"

namespace grpo_kernels {
namespace {

int64_t mtp_targets(Address token_ids, bool wide_ids, Address positions, bool wide_positions, Address mask, int64_t rows,
                    int64_t depths, int64_t shift, int64_t sequence_length, int64_t ignore_index, Address targets,
                    Address counts, int device, Address stream_or_threads) {
  if (device >= 0) throw std::runtime_error("mtp_targets: on CUDA this op runs on Triton");
  const MtpTargetsArgs args{pointer<const void>(token_ids),
                            wide_ids,
                            pointer<const void>(positions),
                            wide_positions,
                            pointer<const uint8_t>(mask),
                            rows,
                            depths,
                            shift,
                            sequence_length,
                            ignore_index,
                            pointer<int64_t>(targets),
                            pointer<int64_t>(counts)};
  py::gil_scoped_release release;
  return GK_CALL_CPU(mtp_targets, args, int(stream_or_threads));
}

}  // namespace

void bind_multi_token_prediction(py::module_& module) { module.def("mtp_targets", &mtp_targets); }

}  // namespace grpo_kernels
