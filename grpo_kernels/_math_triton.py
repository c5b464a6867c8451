"""Row arithmetic that Triton kernels of several ops share."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import ctypes

import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # the running maximum before the first finite logit: no -inf - -inf
UNDERFLOW = tl.constexpr(-150.0)  # 2^u is 0 here; u is clamped, since u * 0 is 0 but -inf * 0 is NaN


@triton.jit
def tanh(x):
    """Polynomial near zero, where 1 - 2 / (e^2x + 1) would cancel."""
    a = tl.abs(x)
    square = x * x
    p = -5.704986926e-3 * square + 2.063908716e-2
    p = p * square - 5.373971505e-2
    p = p * square + 1.333144220e-1
    p = p * square - 3.333328194e-1
    small = x * square * p + x
    e = tl.exp2(a * (-2.0 * LOG2E))
    large = 1.0 - 2.0 * e / (1.0 + e)
    return tl.where(a < 0.625, small, tl.where(x < 0.0, -large, large))


@triton.jit
def clamped(u):
    """u, but not below the exponent at which a float32 power of two is zero. NaN stays."""
    return tl.maximum(u, UNDERFLOW, propagate_nan=tl.PropagateNan.ALL)


def host_factors(
    temperature_tensor: Tensor | None, temperature: float, logit_scale: float, softcap: float
) -> tuple[float, float, float, int]:
    """in_factor, in_low, out_factor and how the temperature comes: 0 in out_factor, 1 one value, 2 one a row.

    z = out_factor * y, y = x * in_factor, or tanh of that. Formed in double precision, as far as the host knows the
    numbers; in_low is what in_factor loses as a float32.
    """
    kind = 0 if temperature_tensor is None else 1 if temperature_tensor.ndim == 0 else 2
    divisor = temperature if temperature_tensor is None else 1.0
    if softcap > 0.0:
        in_factor = logit_scale / softcap
        return in_factor, in_factor - ctypes.c_float(in_factor).value, softcap / divisor, kind
    return 1.0, 0.0, logit_scale / divisor, kind
