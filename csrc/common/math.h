// Elementary functions that compilers can vectorise: no branches, no library call, no table. The float versions are good to
// 1.5 units in the last place (exp_clamped below -20: 4.5) and keep NaN; the double versions call the C library.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/dtype.h"
#include "common/macros.h"

#if defined(__FMA__) || defined(__CUDA_ARCH__) || defined(__ARM_FEATURE_FMA)
#define GK_HAS_FMA 1
#else
#define GK_HAS_FMA 0
#endif

namespace grpo_kernels {
namespace GK_ISA {

// a * b + c, rounded once where the processor can. A source compiled with -ffp-contract=off rounds the same in every loop.
GK_HOST_DEVICE float multiply_add(float a, float b, float c) {
#if GK_HAS_FMA
  return ::fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
GK_HOST_DEVICE double multiply_add(double a, double b, double c) {
#if GK_HAS_FMA
  return ::fma(a, b, c);
#else
  return a * b + c;
#endif
}

// a * b + c with an exact product on every processor, for differences of large numbers.
GK_HOST_DEVICE float exact_multiply_add(float a, float b, float c) {
#if GK_HAS_FMA
  return ::fmaf(a, b, c);
#else
  return float(double(a) * double(b) + double(c));
#endif
}
GK_HOST_DEVICE double exact_multiply_add(double a, double b, double c) { return multiply_add(a, b, c); }

// x = n ln 2 + r, |r| <= ln 2 / 2: e^r, and `biased` whose low bits hold n + 127. |x| <= 89.
template <bool kExact>
GK_HOST_DEVICE float exp_of_remainder(float x, uint32_t& biased) {
  const float magic = 12582912.0f + 127.0f;  // adding 1.5 * 2^23 rounds to an integer
  const float shifted = multiply_add(x, 1.44269504f, magic);
  const float n = shifted - magic;
  biased = float_to_bits(shifted);
#if GK_HAS_FMA  // ln 2 rounded to float, and what that leaves out
  const float coarse = multiply_add(n, -0.69314718f, x);
  const float r = kExact ? multiply_add(n, 1.90465421e-9f, coarse) : coarse;
#else
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts; the first product is exact
#endif
  float p = multiply_add(1.381460199e-3f, r, 8.368715204e-3f);
  p = multiply_add(p, r, 4.166838789e-2f);
  p = multiply_add(p, r, 1.666652065e-1f);
  p = multiply_add(p, r, 4.999999345e-1f);
  p = multiply_add(p, r, 1.0f);
  return multiply_add(p, r, 1.0f);
}

// e^x for -88 <= x <= 1. Exactly 0 at -88, which is where callers clamp: a subnormal result is of no use to a softmax.
GK_HOST_DEVICE float exp_clamped(float x) {
  uint32_t biased;
  const float p = exp_of_remainder<false>(x, biased);
  return p * bits_to_float(biased << 23);
}
GK_HOST_DEVICE double exp_clamped(double x) { return ::exp(x); }

// e^x for any x: 0 below -87.33, infinity above 88.72.
GK_HOST_DEVICE float fast_exp(float x) {
  uint32_t biased;
  const float p = exp_of_remainder<true>(x > 88.8f ? 88.8f : (x < -88.0f ? -88.0f : x), biased);
  const uint32_t exponent = biased & 0x1ffu;  // n + 127, up to 255: 2^n in two factors
  const float low = bits_to_float((exponent - (exponent >> 1)) << 23);
  const float high = bits_to_float(((exponent >> 1) + 127u) << 23);
  return x < -87.33f ? 0.0f : p * high * low;
}
GK_HOST_DEVICE double fast_exp(double x) { return ::exp(x); }

// e^x - 1, and `excess` = e^x - 1 - x: neither cancels at 0, and the excess is not negative. 2^n (e^r - 1) + (2^n - 1), formed
// at half size lest 2^128 overflow; at n = 0 the excess is r^2 times a polynomial.
GK_HOST_DEVICE float fast_expm1(float x, float& excess) {
  const float low = x < -40.0f ? -40.0f : x;
  const float bounded = low > 88.8f ? 88.8f : low;
  const float shifted = multiply_add(bounded, 1.44269504f, 12582912.0f + 126.0f);
  const float n = shifted - (12582912.0f + 126.0f);
#if GK_HAS_FMA
  const float r = multiply_add(n, 1.90465421e-9f, multiply_add(n, -0.693147182f, bounded));
#else
  const float r = (bounded - n * 0.693359375f) - n * -2.12194440e-4f;
#endif
  float p = multiply_add(1.988285658e-4f, r, 1.392632606e-3f);
  p = multiply_add(p, r, 8.333320729e-3f);
  p = multiply_add(p, r, 4.166655242e-2f);
  p = multiply_add(p, r, 1.666666717e-1f);
  p = multiply_add(p, r, 0.5f);
  const float rest = r * r * p;
  const float half = bits_to_float(float_to_bits(shifted) << 23);  // 2^(n - 1)
  const float value = 2.0f * (half * (r + rest) + (half - 0.5f));
  excess = n == 0.0f ? rest : value - (x > 88.8f ? 88.8f : x);
  return value;
}
GK_HOST_DEVICE double fast_expm1(double x, double& excess) {
  const double value = ::expm1(x);
  excess = value - value == 0.0 ? value - x : value;
  return value;
}

GK_HOST_DEVICE float fast_tanh(float x) {
  const float a = x < 0.0f ? -x : x;
  const float square = x * x;
  // |x| < 0.625: an odd polynomial; above: by the exponential.
  float p = multiply_add(-5.704986926e-3f, square, 2.063908716e-2f);
  p = multiply_add(p, square, -5.373971505e-2f);
  p = multiply_add(p, square, 1.333144220e-1f);
  p = multiply_add(p, square, -3.333328194e-1f);
  const float small = multiply_add(x * square, p, x);
  const float e = exp_clamped(a > 44.0f ? -88.0f : -2.0f * a);
  const float large = 1.0f - 2.0f * e / (1.0f + e);
  return a < 0.625f ? small : (x < 0.0f ? -large : large);
}
GK_HOST_DEVICE double fast_tanh(double x) { return ::tanh(x); }

}  // namespace GK_ISA
}  // namespace grpo_kernels
