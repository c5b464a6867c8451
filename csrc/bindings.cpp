// The one file that knows Python: addresses and numbers -> argument structure -> launcher -> exception.
//
// Every kernel function ends with (device, stream_or_threads): device -1 is the CPU, with its number of threads; otherwise a
// CUDA ordinal, with the handle of the current stream. Tensors were checked, and outputs allocated, in Python.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/cpu_isa.h"
#include "common/cuda_probe.h"
#include "group_advantages/group_advantages.h"
#include "grpo_loss/segments.h"
#include "token_log_probs/token_log_probs.h"

#if defined(GK_CUDA)
#include <cuda_runtime.h>
#endif

namespace py = pybind11;
using namespace grpo_kernels;

namespace {

using Address = std::uintptr_t;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

#if defined(GK_CUDA)
void check_cuda(const char* op, int status) {
  if (status == cudaSuccess) return;
  const auto error = static_cast<cudaError_t>(status);
  throw std::runtime_error(std::string(op) + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

// The caller's current device stays current; the extension has its own copy of the CUDA runtime, but contexts belong to the
// driver.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check_cuda("cudaGetDevice", cudaGetDevice(&previous_));
    if (previous_ != device) check_cuda("cudaSetDevice", cudaSetDevice(device));
    changed_ = previous_ != device;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

#define GK_LAUNCH_CUDA(name, args, device, stream)               \
  do {                                                           \
    DeviceGuard guard(device);                                   \
    check_cuda(#name, name##_cuda(args, pointer<void>(stream))); \
    return int64_t(-1);                                          \
  } while (false)
#else
#define GK_LAUNCH_CUDA(name, args, device, stream) \
  throw std::runtime_error(#name ": this build of grpo_kernels has no CUDA kernels")
#endif

// Runs an op with the GIL released. Returns -1, or the first row with a fault that only the data shows.
#define GK_LAUNCH(name, args, device, stream_or_threads)                    \
  do {                                                                      \
    py::gil_scoped_release release;                                         \
    if (device >= 0) GK_LAUNCH_CUDA(name, args, device, stream_or_threads); \
    return GK_CALL_CPU(name, args, int(stream_or_threads));                 \
  } while (false)

Grouping make_grouping(int64_t batch, int64_t group_size, Address order, Address sorted_ids) {
  return {batch, group_size, pointer<const int64_t>(order), pointer<const int64_t>(sorted_ids)};
}

int64_t group_advantages(Address rewards, int dtype, int64_t batch, int functions, int64_t group_size, Address order,
                         Address sorted_ids, Address weights, int baseline, int normalize_by, int aggregation, int singleton,
                         int correction, double eps, Address scratch, Address advantages, Address mean, Address std, int device,
                         Address stream_or_threads) {
  GroupAdvantagesArgs args{};
  args.grouping = make_grouping(batch, group_size, order, sorted_ids);
  args.rewards = pointer<const void>(rewards);
  args.dtype = dtype;
  args.functions = functions;
  args.weights = pointer<const double>(weights);
  args.baseline = baseline;
  args.normalize_by = normalize_by;
  args.aggregation = aggregation;
  args.singleton = singleton;
  args.correction = correction;
  args.eps = eps;
  args.scratch = pointer<double>(scratch);
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

LogitRows make_logit_rows(int64_t rows, int64_t inner, int64_t outer_stride, int64_t inner_stride, int64_t vocab, int dtype) {
  return {rows, vocab, inner, outer_stride, inner_stride, dtype};
}

TokenTransform make_token_transform(Address token_ids, bool wide_ids, Address mask, Address temperatures,
                                    bool temperature_per_row, double temperature, double logit_scale, double softcap) {
  return {pointer<const void>(token_ids),
          wide_ids,
          pointer<const uint8_t>(mask),
          pointer<const void>(temperatures),
          temperature_per_row,
          temperature,
          logit_scale,
          softcap};
}

int64_t token_log_probs(int64_t rows, int64_t inner, int64_t outer_stride, int64_t inner_stride, int64_t vocab, int dtype,
                        Address token_ids, bool wide_ids, Address mask, Address temperatures, bool temperature_per_row,
                        double temperature, double logit_scale, double softcap, Address logits, Address log_probs,
                        Address entropy, Address sum_squared_probs, Address top1_ids, Address statistics, int device,
                        Address stream_or_threads) {
  if (device >= 0) throw std::runtime_error("token_log_probs: on CUDA this op runs on Triton");
  TokenLogProbsArgs args{};
  args.layout = make_logit_rows(rows, inner, outer_stride, inner_stride, vocab, dtype);
  args.transform =
      make_token_transform(token_ids, wide_ids, mask, temperatures, temperature_per_row, temperature, logit_scale, softcap);
  args.logits = pointer<const void>(logits);
  args.log_probs = pointer<void>(log_probs);
  args.entropy = pointer<void>(entropy);
  args.sum_squared_probs = pointer<void>(sum_squared_probs);
  args.top1_ids = pointer<int64_t>(top1_ids);
  args.statistics = pointer<void>(statistics);
  py::gil_scoped_release release;
  return GK_CALL_CPU(token_log_probs, args, int(stream_or_threads));
}

int64_t token_log_probs_backward(int64_t rows, int64_t inner, int64_t outer_stride, int64_t inner_stride, int64_t vocab,
                                 int dtype, Address token_ids, bool wide_ids, Address mask, Address temperatures,
                                 bool temperature_per_row, double temperature, double logit_scale, double softcap,
                                 Address logits, Address statistics, Address grad_log_probs, Address grad_entropy,
                                 Address grad_log_sum_exp, Address grad_logits, int64_t grad_outer_stride,
                                 int64_t grad_inner_stride, int device, Address stream_or_threads) {
  if (device >= 0) throw std::runtime_error("token_log_probs: on CUDA this op runs on Triton");
  TokenLogProbsBackwardArgs args{};
  args.layout = make_logit_rows(rows, inner, outer_stride, inner_stride, vocab, dtype);
  args.transform =
      make_token_transform(token_ids, wide_ids, mask, temperatures, temperature_per_row, temperature, logit_scale, softcap);
  args.logits = pointer<const void>(logits);
  args.statistics = pointer<const void>(statistics);
  args.grad_log_probs = pointer<const void>(grad_log_probs);
  args.grad_entropy = pointer<const void>(grad_entropy);
  args.grad_log_sum_exp = pointer<const void>(grad_log_sum_exp);
  args.grad_logits = pointer<void>(grad_logits);
  args.grad_outer_stride = grad_outer_stride;
  args.grad_inner_stride = grad_inner_stride;
  py::gil_scoped_release release;
  return GK_CALL_CPU(token_log_probs_backward, args, int(stream_or_threads));
}

// How many doubles of workspace and how many counters the loss needs.
std::pair<int64_t, int64_t> grpo_loss_sizes(int64_t batch, int64_t tokens, bool packed) {
  const LossLayout layout{batch, tokens, packed ? &batch : nullptr, true};  // only whether it is packed matters
  return {GK_ISA::loss_kernels::workspace_size(layout), GK_ISA::loss_kernels::count_counters(layout)};
}

int64_t grpo_loss(int64_t batch, int64_t tokens, Address cu_seqlens, bool wide_cu_seqlens, int dtype, int mask_bytes,
                  const std::array<std::array<int64_t, 3>, loss::kLossInputs>& tensors,
                  const std::array<std::pair<Address, double>, loss::kLossNumbers>& numbers, int64_t max_length,
                  const std::array<int, loss::kLossOptions>& options,
                  const std::array<double, loss::kLossParameters>& parameters, Address workspace, Address counters,
                  Address loss, Address grad_log_probs, Address grad_entropy, Address scale, Address metrics, int device,
                  Address stream_or_threads) {
  GRPOLossArgs args{};
  args.layout = {batch, tokens, pointer<const void>(cu_seqlens), wide_cu_seqlens};
  args.dtype = dtype;
  args.mask_bytes = mask_bytes;
  for (size_t i = 0; i < tensors.size(); ++i) {
    args.tensors[i] = {pointer<const void>(Address(tensors[i][0])), tensors[i][1], tensors[i][2]};
  }
  for (size_t i = 0; i < numbers.size(); ++i) args.numbers[i] = {pointer<const void>(numbers[i].first), numbers[i].second};
  for (size_t i = 0; i < options.size(); ++i) args.options[i] = options[i];
  for (size_t i = 0; i < parameters.size(); ++i) args.parameters[i] = parameters[i];
  args.max_length = max_length;
  args.workspace = pointer<double>(workspace);
  args.counters = pointer<uint32_t>(counters);
  args.loss = pointer<void>(loss);
  args.grad_log_probs = pointer<void>(grad_log_probs);
  args.grad_entropy = pointer<void>(grad_entropy);
  args.scale = pointer<void>(scale);
  args.metrics = pointer<float>(metrics);
  GK_LAUNCH(grpo_loss, args, device, stream_or_threads);
}

// "" when CUDA kernels can run on the machine, else the reason why not.
std::string cuda_problem() {
#if defined(GK_CUDA)
  int driver = 0;
  const cudaError_t status = cudaDriverGetVersion(&driver);
  if (status != cudaSuccess) return std::string("cudaDriverGetVersion: ") + cudaGetErrorString(status);
  if (driver == 0) return "no CUDA driver is installed";
  if (driver / 1000 < CUDART_VERSION / 1000) {
    return "the driver supports CUDA " + std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10) +
           ", but the extension was built with CUDA " GK_CUDA_VERSION;
  }
  return "";
#else
  return "built without CUDA kernels";
#endif
}

// "" when the extension holds code that the device can run: machine code of its generation, or PTX of an older one.
std::string cuda_device_problem(int device) {
#if defined(GK_CUDA)
  const std::string problem = cuda_problem();
  if (!problem.empty()) return problem;
  DeviceGuard guard(device);
  const int status = cuda_image_probe();
  if (status == cudaSuccess) return "";
  return std::string("no kernel image for this device (built for " GK_CUDA_ARCHS "): ") +
         cudaGetErrorString(static_cast<cudaError_t>(status));
#else
  (void)device;
  return cuda_problem();
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of grpo_kernels. Private: call the functions of the package.";
#if defined(GK_CUDA)
  m.attr("cuda_version") = GK_CUDA_VERSION;
  m.attr("cuda_archs") = GK_CUDA_ARCHS;
#else
  m.attr("cuda_version") = py::none();
  m.attr("cuda_archs") = "";
#endif
#if defined(GK_OPENMP)
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
  m.def("cpu_isa", &cpu_isa_name);
  m.def("cuda_device_problem", &cuda_device_problem);
  m.def("group_advantages", &group_advantages);
  m.def("informative_groups", &informative_groups);
  m.def("group_rank", &group_rank);
  m.def("grpo_loss_sizes", &grpo_loss_sizes);
  m.def("grpo_loss", &grpo_loss);
  m.def("token_log_probs", &token_log_probs);
  m.def("token_log_probs_backward", &token_log_probs_backward);
}
