"""Routed experts in plain PyTorch: the definition, the oracle in float64, and the fallback on any device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Activation(NamedTuple):
    """What stands between the two products of an expert.

    clamped: gpt-oss' gate * sigmoid(alpha * gate) * (up + 1) of clamped values; else silu(gate) * up.
    interleaved: gates are the even and ups the odd columns; else the first half and the second.
    """

    clamped: bool
    alpha: float
    limit: float
    interleaved: bool


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums and activations of values of this dtype are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def glu(preact: Tensor, activation: Activation) -> Tensor:
    """[..., I] in the dtype of the pre-activations [..., 2I]. The activation, rounded once."""
    value = preact.to(exact_dtype(preact.dtype))
    gate, up = (value[..., ::2], value[..., 1::2]) if activation.interleaved else value.chunk(2, dim=-1)
    if activation.clamped:
        gate = gate.clamp(max=activation.limit)
        up = up.clamp(-activation.limit, activation.limit)
        result = gate * torch.sigmoid(activation.alpha * gate) * (up + 1.0)
    else:
        result = gate * torch.sigmoid(gate) * up
    return result.to(preact.dtype)


def moe_experts(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    topk_weights: Tensor,
    topk_ids: Tensor,
    activation: Activation,
    first: int,
) -> Tensor:
    """[T, H]. One expert after another; all floating arguments but `topk_weights` are of one dtype.

    Args:
        first: the id of the expert that comes first in `gate_up` and `down`.
    """
    total = torch.zeros_like(x, dtype=exact_dtype(x.dtype))
    for expert in range(gate_up.shape[0]):
        slots = topk_ids == first + expert
        if torch.compiler.is_compiling() or x.is_cuda:  # how many they are is not read: all tokens pass
            tokens = torch.arange(x.shape[0], device=x.device)
        else:
            tokens = slots.any(dim=-1).nonzero()[:, 0]
        slots = slots[tokens]
        routed = slots.any(dim=-1, keepdim=True)
        rows = torch.where(routed, x[tokens], 0.0)
        preact = F.linear(rows, gate_up[expert], None if gate_up_bias is None else gate_up_bias[expert])
        y = F.linear(glu(preact, activation), down[expert], None if down_bias is None else down_bias[expert])
        weights = torch.where(slots, topk_weights[tokens], 0.0).sum(dim=-1, keepdim=True)
        total = total.index_add(0, tokens, torch.where(routed, y * weights, 0.0).to(total.dtype))
    return total.to(x.dtype)
