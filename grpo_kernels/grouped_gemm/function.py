"""The autograd function around the kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo_kernels.fp8_quantize import ScaledTensor
from grpo_kernels.grouped_gemm import ops


class Options(NamedTuple):
    """All that is no tensor."""

    gemm_dtype: torch.dtype
    out_dtype: torch.dtype
    backend: str


def grouped_linear(
    options: Options, x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, accumulator: Tensor | None
) -> Tensor:
    """[R, N] through kernels, differentiable by x, weight and bias."""
    trained = (x, weight, bias)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in trained):
        result: Tensor = _GroupedLinear.apply(options, accumulator, x, weight, offsets, bias)  # type: ignore[no-untyped-call]
        return result
    return _forward(options, x, weight, offsets, bias)


def _forward(options: Options, x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    dtype = options.gemm_dtype
    cast_bias = None if bias is None else bias.detach().to(dtype)
    result: Tensor = ops.grouped_gemm(
        x.detach().to(dtype), weight.detach().to(dtype), offsets, cast_bias, options.out_dtype, options.backend
    )
    return result


def weight_gradient(
    x: Tensor | ScaledTensor,
    grad: Tensor | ScaledTensor,
    offsets: Tensor,
    weight: Tensor,
    accumulator: Tensor | None,
    backend: str,
) -> Tensor | None:
    """[E, N, K] in the dtype of `weight` and laid out as it is; None with an accumulator, which takes it.

    A weight that is a view of a parameter [E, K, N] gets its gradient in that order: autograd need not turn it round.

    Args:
        x: [R, K]. Or the quantised transpose, [K, R].
        grad: [R, N]. Or [N, R], likewise.
    """
    layout = weight if accumulator is None else accumulator
    turned = layout.stride(-1) != 1 and layout.stride(1) == 1
    first, second = (grad, x) if turned else (x, grad)
    op, add_op = ops.grouped_gemm_wgrad, ops.grouped_gemm_wgrad_add_
    operands: tuple[Any, ...] = (first, second)
    if isinstance(first, ScaledTensor):
        op, add_op = ops.fp8_grouped_gemm_wgrad, ops.fp8_grouped_gemm_wgrad_add_
        operands = (*first, *second)
    if accumulator is not None:
        add_op(*operands, offsets, accumulator.transpose(1, 2) if turned else accumulator, backend)
        return None
    found: Tensor = op(*operands, offsets, weight.dtype, backend)
    return found.transpose(1, 2) if turned else found


class _GroupedLinear(torch.autograd.Function):
    """Saves the inputs as the caller gave them."""

    @staticmethod
    def forward(
        ctx: Any,
        options: Options,
        accumulator: Tensor | None,
        x: Tensor,
        weight: Tensor,
        offsets: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.options, ctx.accumulator = options, accumulator
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight, offsets)
        return _forward(options, x, weight, offsets, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, offsets = ctx.saved_tensors
        dtype, _, backend = ctx.options
        need_x, need_weight, _, need_bias = ctx.needs_input_grad[2:]
        grad_bias = ops.grouped_row_sum(grad, offsets, backend).to(ctx.bias_dtype) if need_bias else None
        grad = grad.to(dtype)
        grad_x = grad_weight = None
        if need_x:
            turned = weight.to(dtype).transpose(1, 2)
            grad_x = ops.grouped_gemm(grad, turned, offsets, None, x.dtype, backend)
        if need_weight:
            grad_weight = weight_gradient(x.to(dtype), grad, offsets, weight, ctx.accumulator, backend)
        return None, None, grad_x, grad_weight, None, grad_bias
