// From Python's addresses and numbers to argument structures, launchers and exceptions: what every op's binding needs.
//
// Every kernel function ends with (device, stream_or_threads): device -1 is the CPU, with its number of threads; otherwise a
// CUDA ordinal, with the handle of the current stream. Tensors were checked, and outputs allocated, in Python; they come as
// they are (bindings/tensor.h), None for an absent one, or, in bindings whose time does not matter, as addresses.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "bindings/tensor.h"
#include "common/cpu_isa.h"

#if defined(GK_CUDA)
#include <cuda_runtime.h>
#endif

namespace grpo_kernels {

namespace py = pybind11;

using Address = std::uintptr_t;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// Scratch of a kernel: what the caller allocated, or, where that is nothing (on the CPU), memory of the call, full of NaN so
// that a number that is read before it was written shows.
class Scratch {
 public:
  template <typename Size>
  Scratch(double* given, Size doubles) : data_(given) {
    if (data_ != nullptr) return;
    own_.assign(size_t(doubles()), std::numeric_limits<double>::quiet_NaN());
    data_ = own_.data();
  }
  double* data() const { return data_; }

 private:
  std::vector<double> own_;
  double* data_;
};

// A list or tuple of exactly as many numbers.
template <typename T, size_t N>
void read_numbers(py::handle sequence, T (&out)[N]) {
  const auto items = py::reinterpret_steal<py::object>(PySequence_Fast(sequence.ptr(), "a list or tuple is expected"));
  if (!items) throw py::error_already_set();
  if (PySequence_Fast_GET_SIZE(items.ptr()) != Py_ssize_t(N)) throw py::value_error("another number of numbers is expected");
  for (size_t i = 0; i < N; ++i) {
    PyObject* const item = PySequence_Fast_GET_ITEM(items.ptr(), Py_ssize_t(i));
    out[i] = std::is_integral_v<T> ? T(PyLong_AsLongLong(item)) : T(PyFloat_AsDouble(item));
  }
  if (PyErr_Occurred() != nullptr) throw py::error_already_set();
}

#if defined(GK_CUDA)
inline void check_cuda(const char* op, int status) {
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

// One function per op, each in its own file.
void bind_fp8_quantize(py::module_& module);
void bind_group_advantages(py::module_& module);
void bind_grpo_loss(py::module_& module);
void bind_moe_experts(py::module_& module);
void bind_moe_permute(py::module_& module);
void bind_moe_router(py::module_& module);
void bind_multi_token_prediction(py::module_& module);
void bind_speculative_sampling(py::module_& module);
void bind_token_log_probs(py::module_& module);

}  // namespace grpo_kernels
