"""Gradients that are formed together with a loss: when they may be, which ones, and how they become its derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo_kernels.linear_log_probs.function import Options
from grpo_kernels.linear_log_probs.head import Head
from grpo_kernels.linear_log_probs.sums import Gradients

Again = Callable[..., tuple[Any, Gradients]]
Leaves = tuple[Tensor | None, ...]
"""Hidden states, weight, bias and LoRA factors, as the caller gave them."""
_SLICE_BYTES = 64 << 20


def needs_gradient(leaves: Leaves) -> bool:
    """Whether there will be a backward."""
    return torch.is_grad_enabled() and any(leaf is not None and leaf.requires_grad for leaf in leaves)


def may_form_gradients(options: Options) -> bool:
    """Whether the kernels can form the gradients of a scalar loss in its forward.

    Not for a part of a vocabulary, whose statistics are not those of the whole; nor in float16, where the loss is
    scaled before its gradients are formed, lest they vanish.
    """
    return options.shard is None and options.gemm_dtype != torch.float16 and options.backend != "reference"


def requests(leaves: Leaves, accumulator: Tensor | None) -> tuple[Any, ...]:
    """Which gradients an op forms, and in which dtypes those of hidden states and weight.

    Those of float16 leaves are formed in float32, since the loss is scaled later.
    """
    hidden, weight, bias, lora_a, lora_b = (leaf is not None and leaf.requires_grad for leaf in leaves)
    dtypes = [torch.promote_types(leaf.dtype, torch.bfloat16) for leaf in leaves[:2] if leaf is not None]
    if accumulator is not None:
        dtypes[1] = accumulator.dtype
    return hidden, weight, bias, lora_a or lora_b, *dtypes


def cast(
    options: Options, hidden: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None
) -> tuple[Tensor, Head]:
    """Hidden states and head in the dtype of the products."""
    head = Head(weight, bias, lora_a, lora_b, options.lora_scale)
    return hidden.to(options.gemm_dtype), head.to(options.gemm_dtype)


def attach(
    loss: Tensor, gradients: Gradients, leaves: Leaves, others: tuple[Tensor | None, ...], again: Again,
    accumulator: Tensor | None,
) -> Tensor:  # fmt: skip
    """The loss, with `gradients` as its derivatives by `leaves`: hidden states, weight, bias and LoRA factors.

    The backward multiplies the gradients where they lie and gives them away. Nothing is left for a second one (with
    `retain_graph`), which computes them again: `again(*leaves, *others)[1]`.

    Args:
        loss: 0-d.
        gradients: their only owner gives them to this function.
        leaves: the five parameters as the caller gave them.
        others: further tensors that the gradients come from.
        again: computes the gradients.
        accumulator: takes the weight's gradient, in the backward, instead of the weight.
    """
    if not torch.compiler.is_compiling():  # autograd saves no tensor of inference mode, as old log-probs often are
        others = tuple(t.clone() if t is not None and t.is_inference() else t for t in others)
    result: Tensor = _Attached.apply(again, accumulator, loss, *gradients, *leaves, *others)  # type: ignore[no-untyped-call]
    return result


def scale_(values: Tensor, factor: Tensor) -> Tensor:
    """values *= factor, rounded once: a product of bf16 with a 0-d tensor rounds that first."""
    if factor.device.type == "cpu" and bool(factor == 1):
        return values
    if values.element_size() >= 4 or values.numel() == 0:
        return values.mul_(factor)
    rows = max(_SLICE_BYTES // (4 * values[0].numel()), 1)
    for start in range(0, len(values), rows):
        part = values[start : start + rows]
        part.copy_(part.float().mul_(factor))
    return values


class _Attached(torch.autograd.Function):
    """Saves what the gradients come from, so that a change of it before the backward is noticed; while compiling, the
    gradients themselves, which the graph then owns."""

    @staticmethod
    def forward(ctx: Any, again: Again, accumulator: Tensor | None, loss: Tensor, *tensors: Tensor | None) -> Tensor:
        gradients, inputs = tensors[:5], tensors[5:]
        ctx.again, ctx.accumulator, ctx.count = again, accumulator, len(inputs)
        ctx.dtypes = [None if leaf is None else leaf.dtype for leaf in inputs[:5]]
        ctx.traced = torch.compiler.is_compiling()
        ctx.save_for_backward(*(gradients if ctx.traced else inputs))
        ctx.gradients = None if ctx.traced else gradients
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # raises if the graph is freed or an input has changed
        if ctx.traced:
            scaled = [(gradient.to(upstream.dtype) * upstream).to(gradient.dtype) for gradient in saved]
            if ctx.accumulator is not None:
                ctx.accumulator.add_(scaled[1])
                scaled[1] = None
        else:
            gradients, ctx.gradients = ctx.gradients, None
            if gradients is None:
                with torch.no_grad():
                    _, gradients = ctx.again(*saved)
            if ctx.accumulator is not None:
                ctx.accumulator.addcmul_(gradients[1], upstream)
                gradients = (gradients[0], None, *gradients[2:])
            scaled = [None if gradient is None else scale_(gradient, upstream) for gradient in gradients]
        needs = ctx.needs_input_grad[8:13]
        wanted = (
            gradient.to(dtype) if need and gradient is not None else None
            for gradient, dtype, need in zip(scaled, ctx.dtypes, needs, strict=True)
        )  # fmt: skip
        return None, None, None, *[None] * 5, *wanted, *[None] * (ctx.count - 5)
