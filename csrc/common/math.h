// Elementary functions that compilers can vectorise: no branches, no library call, no table. The float versions are good to two units
// in the last place and keep NaN; the double versions call the C library.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/dtype.h"
#include "common/macros.h"

namespace grpo_kernels {
namespace GK_ISA {

// e^x for x <= 0. Below -87.33 the result would be subnormal: it is exactly 0.
GK_HOST_DEVICE float exp_nonpositive(float x) {
  const float shifted = x * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 leaves round(x / ln 2) in the low bits
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts; the first product is exact
  float p = 1.381460199e-3f;
  p = p * r + 8.368715204e-3f;
  p = p * r + 4.166838789e-2f;
  p = p * r + 1.666652065e-1f;
  p = p * r + 4.999999345e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const float power = bits_to_float((float_to_bits(shifted) + 127u) << 23);
  return x < -87.33f ? 0.0f : p * power;
}
GK_HOST_DEVICE double exp_nonpositive(double x) { return ::exp(x); }

// e^x for any x: 0 below -87.33, infinity above 88.72.
GK_HOST_DEVICE float fast_exp(float x) {
  const float clamped = x > 88.8f ? 88.8f : (x < -88.0f ? -88.0f : x);
  const float shifted = clamped * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.381460199e-3f;
  p = p * r + 8.368715204e-3f;
  p = p * r + 4.166838789e-2f;
  p = p * r + 1.666652065e-1f;
  p = p * r + 4.999999345e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // 2^n in two factors, because n reaches 128.
  const int32_t exponent = int32_t(float_to_bits(shifted) << 9) >> 9;
  const float low = bits_to_float(uint32_t((exponent >> 1) + 127) << 23);
  const float high = bits_to_float(uint32_t(exponent - (exponent >> 1) + 127) << 23);
  return x < -87.33f ? 0.0f : p * low * high;
}
GK_HOST_DEVICE double fast_exp(double x) { return ::exp(x); }

GK_HOST_DEVICE float fast_tanh(float x) {
  const float a = x < 0.0f ? -x : x;
  const float square = x * x;
  float p = -5.704986926e-3f;  // |x| < 0.625: odd polynomial; above: by the exponential
  p = p * square + 2.063908716e-2f;
  p = p * square - 5.373971505e-2f;
  p = p * square + 1.333144220e-1f;
  p = p * square - 3.333328194e-1f;
  const float small = x + x * square * p;
  const float e = exp_nonpositive(-2.0f * a);
  const float large = (1.0f - e) / (1.0f + e);
  return a < 0.625f ? small : (x < 0.0f ? -large : large);
}
GK_HOST_DEVICE double fast_tanh(double x) { return ::tanh(x); }

}  // namespace GK_ISA
}  // namespace grpo_kernels
