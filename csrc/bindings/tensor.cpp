// How the parts of a tensor are read.
#include "bindings/tensor.h"

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace grpo_kernels {
namespace {

const dlpack::ExchangeApi* exchange = nullptr;
PyTypeObject* tensor_type = nullptr;

// The table of a version that is known here, or nullptr.
const dlpack::ExchangeApi* find_exchange(py::handle type) {
  const py::object capsule = py::getattr(type, "__dlpack_c_exchange_api__", py::none());
  if (capsule.is_none()) return nullptr;
  const void* table = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
  if (table == nullptr) throw py::error_already_set();
  auto api = static_cast<const dlpack::ExchangeApi*>(table);
  while (api != nullptr && api->major != dlpack::kMajor) api = api->previous;
  return api;
}

// Of a type such as torch.float32 or torch.bool; anything else has no code that a kernel takes.
dlpack::DataType data_type(const std::string& name, int bytes) {
  const std::string kind = name.substr(name.find('.') + 1);
  uint8_t code = dlpack::kInt;
  if (kind == "bfloat16") {
    code = dlpack::kBfloat;
  } else if (kind == "bool") {
    code = dlpack::kBool;
  } else if (kind.rfind("float", 0) == 0) {
    code = dlpack::kFloat;
  } else if (kind.rfind("uint", 0) == 0) {
    code = dlpack::kUInt;
  }
  return {code, uint8_t(8 * bytes), 1};
}

}  // namespace

void set_tensor_type(py::handle type, bool attributes) {
  exchange = attributes ? nullptr : find_exchange(type);
  Py_XDECREF(tensor_type);
  tensor_type = reinterpret_cast<PyTypeObject*>(type.inc_ref().ptr());
}

py::object signature(const py::tuple& tensors) {
  static PyObject* const requires_grad = PyUnicode_InternFromString("requires_grad");
  static PyObject* const is_neg = PyUnicode_InternFromString("is_neg");
  if (exchange == nullptr) return py::none();
  std::vector<int64_t> words;
  words.reserve(8 * tensors.size());
  for (const py::handle tensor : tensors) {
    if (tensor.is_none()) {
      words.push_back(-1);
      continue;
    }
    if (Py_TYPE(tensor.ptr()) != tensor_type) return py::none();
    dlpack::Tensor view;
    if (exchange->from_object(tensor.ptr(), &view) != 0) {
      PyErr_Clear();
      return py::none();
    }
    const auto negated = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor.ptr(), is_neg));
    const auto wants_gradient = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor.ptr(), requires_grad));
    if (!negated || !wants_gradient) throw py::error_already_set();
    if (view.data == nullptr || negated.ptr() != Py_False) return py::none();
    words.push_back(view.ndim << 1 | int(wants_gradient.ptr() == Py_True));
    words.push_back(int64_t(view.dtype.code) << 32 | int64_t(view.dtype.bits) << 16 | view.dtype.lanes);
    words.push_back(int64_t(view.device.type) << 32 | uint32_t(view.device.id));
    words.insert(words.end(), view.shape, view.shape + view.ndim);
  }
  return py::bytes(reinterpret_cast<const char*>(words.data()), words.size() * sizeof(int64_t));
}

void TensorArg::read(py::handle tensor) {
  object_ = py::reinterpret_borrow<py::object>(tensor);
  if (tensor.is_none()) return;
  if (exchange == nullptr) return read_attributes(tensor);
  if (!PyObject_TypeCheck(tensor.ptr(), tensor_type)) throw py::type_error("a tensor is expected, or None");
  if (exchange->from_object(tensor.ptr(), &view_) != 0) throw py::error_already_set();
  view_.data = static_cast<char*>(view_.data) + view_.byte_offset;
}

void TensorArg::read_attributes(py::handle tensor) {
  const py::tuple shape = tensor.attr("shape"), strides = tensor.attr("stride")();
  view_.data = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>());
  view_.ndim = int32_t(shape.size());
  view_.dtype = data_type(py::str(tensor.attr("dtype")), tensor.attr("element_size")().cast<int>());
  shape_.clear();
  strides_.clear();
  for (size_t axis = 0; axis < shape.size(); ++axis) {
    shape_.push_back(shape[axis].cast<int64_t>());
    strides_.push_back(strides[axis].cast<int64_t>());
  }
  view_.shape = shape_.data();
  view_.strides = strides_.data();
}

bool TensorArg::has_shape_of(const TensorArg& other) const {
  if (view_.ndim != other.view_.ndim) return false;
  for (int axis = 0; axis < view_.ndim; ++axis) {
    if (view_.shape[axis] != other.view_.shape[axis]) return false;
  }
  return true;
}

int TensorArg::dtype() const {
  const int bits = view_.dtype.bits;
  if (view_.dtype.code == dlpack::kBfloat) return kBFloat16;
  if (view_.dtype.code == dlpack::kFloat && bits >= 16) return bits == 16 ? kFloat16 : bits == 32 ? kFloat32 : kFloat64;
  throw py::type_error("a tensor of a floating type is expected");
}

void TensorArg::copy() { read(object_.attr("contiguous")()); }

const TensorArg& TensorArg::dense() {
  int64_t expected = 1;
  for (int axis = view_.ndim - 1; axis >= 0; --axis) {
    if (view_.shape[axis] != 1 && view_.strides[axis] != expected) {
      copy();
      break;
    }
    expected *= view_.shape[axis];
  }
  return *this;
}

const TensorArg& TensorArg::dense_rows() {
  if (view_.ndim > 0 && size(-1) != 1 && stride(-1) != 1) copy();
  return *this;
}

}  // namespace grpo_kernels
