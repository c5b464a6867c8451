// Binding of fp8_quantize and fp8_dequantize.
#include "fp8_quantize/fp8_quantize.h"

#include "bindings/fp8.h"

namespace grpo_kernels {
namespace {

int64_t fp8_quantize(Address x, int64_t batch_stride, int64_t row_stride, int dtype, int64_t batch, int64_t rows,
                     int64_t columns, bool square, bool power_of_two, double eps, const Fp8Numbers& plain,
                     const Fp8Numbers& transposed, int device, Address stream_or_threads) {
  if (device >= 0) throw std::runtime_error("fp8_quantize: on CUDA this op runs on Triton");
  const Fp8QuantizeArgs args{
      pointer<const void>(x), batch_stride,          row_stride, dtype, batch, rows, columns, square, power_of_two, float(eps),
      fp8_tensor(plain),      fp8_tensor(transposed)};
  py::gil_scoped_release release;
  return GK_CALL_CPU(fp8_quantize, args, int(stream_or_threads));
}

int64_t fp8_dequantize(const Fp8Numbers& in, int64_t batch, int64_t rows, int64_t columns, int row_tile, int column_tile,
                       int dtype, Address out, int device, Address stream_or_threads) {
  if (device >= 0) throw std::runtime_error("fp8_dequantize: on CUDA this op runs on Triton");
  const Fp8DequantizeArgs args{fp8_tensor(in), batch, rows, columns, row_tile, column_tile, dtype, pointer<void>(out)};
  py::gil_scoped_release release;
  return GK_CALL_CPU(fp8_dequantize, args, int(stream_or_threads));
}

}  // namespace

void bind_fp8_quantize(py::module_& module) {
  module.def("fp8_quantize", &fp8_quantize);
  module.def("fp8_dequantize", &fp8_dequantize);
}

}  // namespace grpo_kernels
