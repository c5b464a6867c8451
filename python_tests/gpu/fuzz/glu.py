"""The activation and its derivatives in float64, and how far float32 may be from them.

In units of 2^-24: an exponential of argument z is wrong by 2 |z| + 4 (its argument is rounded twice, the function good
to 2 ulps), a quotient by 4, each product or sum by 1. A sum 1 + z (1 - s) that cancels is wrong by as much relative to
the sizes of its terms. Below the smallest normal numbers kernels may give 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels.moe_experts.reference import Activation

UNIT = 2.0**-24
_UNDERFLOW = 2.0**-120


class Bounded(NamedTuple):
    """What a float32 result may be: `value` and `bound` more or less."""

    value: Tensor
    bound: Tensor

    def __mul__(self, factor: Tensor) -> Bounded:  # type: ignore[override]
        """Times an exact factor, rounded once more."""
        value = self.value * factor
        return Bounded(value, self.bound * factor.abs() + UNIT * value.abs())


class Glu(NamedTuple):
    """[R, I] each; the gradients are per unit of the activation's gradient."""

    activated: Bounded
    of_gate: Bounded
    of_up: Bounded
    gate_passes: Tensor  # where a clamp lets the gradient pass, whatever it is
    up_passes: Tensor


def float32(number: float) -> float:
    """As kernels get it."""
    return torch.tensor(number, dtype=torch.float32).item()


def glu(preact: Tensor, activation: Activation) -> Glu:
    """Of pre-activations [R, 2I]."""
    value = preact.double()
    gate, up = (value[:, ::2], value[:, 1::2]) if activation.interleaved else value.chunk(2, 1)
    bounded, factor, slope = gate, up, gate
    alpha, limit = float32(activation.alpha), float32(activation.limit)
    if activation.clamped:
        bounded, factor = gate.clamp(max=limit), up.clamp(-limit, limit) + 1.0
        slope = alpha * bounded
    sigmoid, rest = slope.sigmoid(), (-slope).sigmoid()
    underflow, relative = torch.full_like(slope, _UNDERFLOW), UNIT * (16 + 4 * slope.abs()).nan_to_num(0.0)
    for size in (bounded, factor, slope):
        underflow = underflow * (1 + size.abs().nan_to_num(0.0))

    def within(result: Tensor, size: Tensor) -> Bounded:
        return Bounded(result, relative * size + underflow)

    activated, of_up = bounded * sigmoid * factor, bounded * sigmoid
    of_gate = factor * sigmoid * (1 + slope * rest)
    sizes = factor.abs() * sigmoid * (1 + slope.abs() * rest)
    everywhere = torch.ones_like(gate, dtype=torch.bool)
    passes = (gate <= limit, (up >= -limit) & (up <= limit)) if activation.clamped else (everywhere, everywhere)
    return Glu(within(activated, activated.abs()), within(of_gate, sizes), within(of_up, of_up.abs()), *passes)


def joined(of_gate: Bounded, of_up: Bounded, interleaved: bool) -> Bounded:
    """[R, 2I] as pre-activations lie."""
    pairs = zip(of_gate, of_up, strict=True)
    return Bounded(*(torch.stack(pair, 2).flatten(1) if interleaved else torch.cat(pair, 1) for pair in pairs))


def masked(bounded: Bounded, kept: Tensor) -> Bounded:
    """0, exactly, elsewhere: in rows of padding, and where a clamp stops the gradient."""
    return Bounded(*(torch.where(kept, part, 0.0) for part in bounded))
