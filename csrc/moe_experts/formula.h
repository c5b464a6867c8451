// The activation of an expert, and its derivatives.
//
//   swiglu           a = gate s up,             s = 1 / (1 + e^-gate)
//   clamped_swiglu   a = gate s (up + 1),       s = 1 / (1 + e^-(alpha gate)), gate <= limit, |up| <= limit
//   da/dgate = factor s (1 + alpha gate (1 - s)), factor = up or up + 1;   da/dup = gate s
//
// 1 - s is formed without cancellation. A clamp passes the gradient at its limit and stops it beyond, and for NaN, as torch's.
#pragma once

#include "common/math.h"
#include "moe_experts/moe_experts.h"

namespace grpo_kernels {
namespace GK_ISA {

template <typename A>
struct Sigmoid {
  A value, complement;  // their sum is 1

  static GK_HOST_DEVICE Sigmoid of(A z) {
    const A e = fast_exp(-z);
    const A value = A(1) / (A(1) + e);
    return {value, z < A(0) ? A(1) - value : e * value};  // e may be infinite where z < 0
  }
};

template <typename A>
struct GluGradient {
  A activated, gate, up;
};

template <bool kClamped, typename A>
struct Glu {
  A alpha, limit;

  GK_HOST_DEVICE A clamped_gate(A gate) const { return kClamped && gate > limit ? limit : gate; }
  GK_HOST_DEVICE A factor(A up) const {
    const A low = kClamped && up < -limit ? -limit : up;
    return kClamped ? (low > limit ? limit : low) + A(1) : low;
  }
  GK_HOST_DEVICE A slope(A gate) const { return kClamped ? alpha * gate : gate; }

  GK_HOST_DEVICE A value(A gate, A up) const {
    const A bounded = clamped_gate(gate);
    return bounded * Sigmoid<A>::of(slope(bounded)).value * factor(up);
  }

  // The value, and `grad` times its derivatives.
  GK_HOST_DEVICE GluGradient<A> gradient(A gate, A up, A grad) const {
    const A bounded = clamped_gate(gate);
    const A z = slope(bounded);
    const Sigmoid<A> sigmoid = Sigmoid<A>::of(z);
    const A passed = bounded * sigmoid.value;
    const A scale = factor(up);
    const A of_gate = grad * scale * (sigmoid.value * (A(1) + z * sigmoid.complement));
    const A of_up = grad * passed;
    if (!kClamped) return {passed * scale, of_gate, of_up};
    return {passed * scale, gate <= limit ? of_gate : A(0), up >= -limit && up <= limit ? of_up : A(0)};
  }
};

}  // namespace GK_ISA
}  // namespace grpo_kernels
