// Element types as the Python side numbers them (grpo_kernels/_extension.py: DTYPE_CODE), and their conversion to arithmetic
// types.
//
// The 16-bit conversions are integer arithmetic on whole words, so that compilers vectorise them on every instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/macros.h"

namespace grpo_kernels {

enum DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

namespace GK_ISA {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

GK_HOST_DEVICE float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

GK_HOST_DEVICE uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

GK_HOST_DEVICE float to_arithmetic(float value) { return value; }
GK_HOST_DEVICE double to_arithmetic(double value) { return value; }
GK_HOST_DEVICE float to_arithmetic(bfloat16 value) { return bits_to_float(uint32_t(value.bits) << 16); }

GK_HOST_DEVICE float to_arithmetic(float16 value) {
  const uint32_t magnitude = uint32_t(value.bits & 0x7fffu) << 13;
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
  // Rebias the exponent by a multiplication, which also normalises subnormals; then restore infinities and NaN.
  float scaled = bits_to_float(magnitude) * bits_to_float(0x77800000u);  // 2^112
  uint32_t bits = float_to_bits(scaled);
  bits |= magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  return bits_to_float(bits | sign);
}

// Round to nearest, ties to even. NaN stays NaN.
GK_HOST_DEVICE void from_arithmetic(float value, float& out) { out = value; }
GK_HOST_DEVICE void from_arithmetic(double value, double& out) { out = value; }
GK_HOST_DEVICE void from_arithmetic(double value, float& out) { out = float(value); }

GK_HOST_DEVICE void from_arithmetic(float value, bfloat16& out) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out.bits = uint16_t(value != value ? 0x7fc0u : rounded);
}

GK_HOST_DEVICE void from_arithmetic(float value, float16& out) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal results: rebias the exponent and round the low 13 bits. Subnormal results: let an addition to 0.5 do the rounding.
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x477ff000u ? 0x7c00u : result;  // 65520 and above round to infinity
  result = magnitude > 0x7f800000u ? 0x7e00u : result;
  out.bits = uint16_t(result | sign);
}

}  // namespace GK_ISA
}  // namespace grpo_kernels
