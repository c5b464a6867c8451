// The maths of one row of logits.
//
//   z = logits * logit_scale;  z = softcap * tanh(z / softcap);  z = z / temperature
//   u = z - max z;  s = sum e^u;  w = sum u e^u;  q = sum e^2u
//   log_prob = u_target - log s;  entropy = log s - w / s;  sum of squared probabilities = q / s^2
//   log_sum_exp = max z + log s
//   dz_j = g_log_prob 1[j = target] - (g_log_prob - g_log_sum_exp) p_j + g_entropy p_j (w / s - u_j),  p = e^u / s
//
// s, w and q are sums of terms of one sign, so nothing cancels. -inf stays -inf through the softcap: probability zero.
//
// The statistics max z, s, z_target and w may be merged over parts of a vocabulary; the gradient of a part takes those of the
// whole. A part that holds nothing but -inf has (-inf, 0, -inf, 0).
#pragma once

#include "common/math.h"
#include "token_log_probs/token_log_probs.h"

namespace grpo_kernels {
namespace GK_ISA {

// Where exp_clamped gives 0: u is clamped there, since u * 0 is 0 but -inf * 0 is NaN.
GK_HOST_DEVICE float clamp_exponent(float u) { return -88.0f > u ? -88.0f : u; }
GK_HOST_DEVICE double clamp_exponent(double u) { return -800.0 > u ? -800.0 : u; }

GK_HOST_DEVICE float infinity_of(float) { return __builtin_inff(); }
GK_HOST_DEVICE double infinity_of(double) { return __builtin_inf(); }
GK_HOST_DEVICE float nan_of(float) { return __builtin_nanf(""); }
GK_HOST_DEVICE double nan_of(double) { return __builtin_nan(""); }

template <typename A>
GK_HOST_DEVICE bool is_finite(A value) {
  return value - value == A(0);
}

// z = out * y, where y = +-x, or tanh(in * x) with a softcap; out > 0, so the largest y gives the largest z. The
// factors are formed once a row, in double precision. z itself is never rounded: u = (y - max y) * out in the forward,
// and in the backward u = out * y - max z with an exact product, whatever the scale and temperature.
template <typename A>
struct Transform {
  A in, in_low, out;  // in_low: what `in` lost when it was rounded

  GK_HOST_DEVICE static Transform make(double logit_scale, double softcap, double temperature) {
    double in = softcap > 0.0 ? logit_scale / softcap : 1.0;
    double out = softcap > 0.0 ? softcap / temperature : logit_scale / temperature;
    if (out < 0.0) {
      in = -in;
      out = -out;
    }
    return {A(in), A(in - double(A(in))), A(out)};
  }

  template <bool kCapped>
  GK_HOST_DEVICE A apply(A x) const {
    if (!kCapped) return x * in;
    const A t = fast_tanh(multiply_add(x, in, x * in_low));
    return is_finite(x) ? t : x * in;
  }

  // dz / dx = slope() * bend(y)
  GK_HOST_DEVICE A slope() const { return in * out; }
  template <bool kCapped>
  GK_HOST_DEVICE A bend(A y) const {
    return kCapped && is_finite(y) ? A(1) - y * y : A(1);
  }
};

// Sums over the first part of a row, block by block, relative to the largest y so far. In double: a row has a hundred
// thousand terms.
struct RowSums {
  double sum, weighted, squared;

  // The sums relative to a maximum that is higher by -shift.
  GK_HOST_DEVICE void rebase(double shift) {
    const double factor = ::exp(shift);
    weighted = (weighted + shift * sum) * factor;
    sum *= factor;
    squared *= factor * factor;
  }

  GK_HOST_DEVICE double log_prob(double u_target) const { return u_target - ::log(sum); }
  GK_HOST_DEVICE double entropy() const { return ::log(sum) - weighted / sum; }
  GK_HOST_DEVICE double sum_squared_probs() const { return squared / sum / sum; }
};

// dz_j * slope = e^u_j (constant + linear u_j), and at_target at the target.
template <typename A>
struct RowGradient {
  A max, constant, linear, inverse_sum, mean_u, slope;

  // NaN in a row's statistics makes every coefficient, and so the whole row, NaN.
  GK_HOST_DEVICE static RowGradient make(A max, A sum, A weighted, A grad_log_prob, A grad_entropy, A grad_log_sum_exp,
                                         A slope) {
    const A inverse = is_finite(max) && is_finite(sum) ? A(1) / sum : nan_of(A());
    const A mean_u = weighted * inverse;
    const A factor = inverse * slope;
    const A constant = (grad_entropy * mean_u - (grad_log_prob - grad_log_sum_exp)) * factor;
    return {max, constant, -grad_entropy * factor, inverse, mean_u, slope};
  }

  GK_HOST_DEVICE A at(A u) const {
    const A bounded = clamp_exponent(u);
    return exp_clamped(bounded) * multiply_add(linear, bounded, constant);
  }

  GK_HOST_DEVICE A at_target(A u, A grad_log_prob, A grad_entropy, A grad_log_sum_exp) const {
    const A bounded = clamp_exponent(u);
    const A p = exp_clamped(bounded) * inverse_sum;
    return (grad_log_prob * (A(1) - p) + grad_log_sum_exp * p + grad_entropy * p * (mean_u - bounded)) * slope;
  }
};

}  // namespace GK_ISA
}  // namespace grpo_kernels
