// Tensors as arguments of bindings, read where Python's object keeps them: no torch header, no link to torch.
//
// Tensor types that offer DLPack's table of C functions (PyTorch 2.10 and later) fill in a DLTensor in some tens of
// nanoseconds. Of other types the attributes are read: the same numbers, more slowly. `set_tensor_type` says which type it is.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "common/dtype.h"

namespace grpo_kernels {

namespace py = pybind11;

// The part of DLPack 1.3's C interface that is used here, in its layout: https://github.com/dmlc/dlpack (Apache-2.0).
namespace dlpack {

enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6 };

struct Device {
  int32_t type;
  int32_t id;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major, minor;
  ExchangeApi* previous;
  void* allocate;
  void* managed_from_object;
  void* object_from_managed;
  int (*from_object)(void* object, Tensor* out);  // borrows; -1 with a Python exception
  void* current_stream;
};

constexpr uint32_t kMajor = 1;

}  // namespace dlpack

// A tensor that lives as long as the call, or none where Python passed None.
class TensorArg {
 public:
  void read(py::handle tensor);

  bool given() const { return !object_.is_none(); }

  // nullptr where there is no tensor, and where it has no elements.
  template <typename T>
  T* data() const {
    return static_cast<T*>(view_.data);
  }
  int ndim() const { return view_.ndim; }
  int64_t size(int axis) const { return view_.shape[place(axis)]; }
  int64_t stride(int axis) const { return view_.strides[place(axis)]; }
  bool has_shape_of(const TensorArg& other) const;

  // As csrc/common/dtype.h numbers floating types.
  int dtype() const;
  int bytes() const { return view_.dtype.bits / 8; }
  bool wide() const { return view_.dtype.bits == 64; }
  bool is_signed() const { return view_.dtype.code == dlpack::kInt; }

  // Copies the tensor where its elements are not neighbours, or those of a row, its last axis, are not.
  const TensorArg& dense();
  const TensorArg& dense_rows();

 private:
  int place(int axis) const { return axis < 0 ? view_.ndim + axis : axis; }
  void read_attributes(py::handle tensor);
  void copy();

  py::object object_ = py::none();
  dlpack::Tensor view_{};
  std::vector<int64_t> shape_, strides_;  // what the view points to where the attributes were read
};

// `type` is torch.Tensor; with `attributes` its functions of DLPack are not used.
void set_tensor_type(py::handle type, bool attributes);

// What a check of arguments looks at, of a tuple of tensors (None: absent): the element type, device and sizes of each and
// whether it wants a gradient, in bytes. None where one is of a subclass, negated, without elements or without memory.
py::object signature(const py::tuple& tensors);

}  // namespace grpo_kernels

template <>
struct pybind11::detail::type_caster<grpo_kernels::TensorArg> {
  PYBIND11_TYPE_CASTER(grpo_kernels::TensorArg, const_name("torch.Tensor | None"));

  bool load(handle source, bool) {
    value.read(source);
    return true;
  }
};
