"""Logits of a router in float32, with the tokens kept for the backward in their own dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo_kernels._autocast import no_autocast


def router_logits(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[T, E] float32 (float64 if an input is): x weight^T + bias, whatever autocast says.

    A product in bfloat16 rounds logits so that one token in thirteen has two experts exactly equal at the edge of its
    choice. A plain float32 linear would keep x in float32 for the backward; this keeps x as it came.

    Args:
        x: [T, H] float. The tokens.
        weight: [E, H] float.
        bias: [E] float.
    """
    with no_autocast(x.device.type):
        logits: Tensor = _RouterLogits.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return logits


class _RouterLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        dtype = _exact_dtype(x, weight)
        logits = x.to(dtype) @ weight.to(dtype).T
        return logits if bias is None else logits + bias.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        with no_autocast(x.device.type):
            if ctx.needs_input_grad[0]:
                grad_x = (grad @ weight.to(grad.dtype)).to(x.dtype)
            if ctx.needs_input_grad[1]:
                grad_weight = (grad.T @ x.to(grad.dtype)).to(weight.dtype)
            if ctx.needs_input_grad[2]:
                grad_bias = grad.sum(dim=0).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias


def _exact_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (x.dtype, weight.dtype) else torch.float32
