"""The losses whose gradients are formed in the forward: their values and derivatives, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grpo_kernels._gemm import without_autocast
from grpo_kernels._token_ids import live_rows
from grpo_kernels.grpo_loss import ops as loss_ops
from grpo_kernels.linear_log_probs.chunks import one_pass
from grpo_kernels.linear_log_probs.head import Head
from grpo_kernels.linear_log_probs.ops import empty_gradients
from grpo_kernels.linear_log_probs.row_values import Slopes, Targets, Values
from grpo_kernels.linear_log_probs.sums import Gradients, Needs
from grpo_kernels.token_log_probs.arguments import raise_if_outside


def implementations(backend: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The ops linear_cross_entropy and linear_grpo_loss on the row kernels of a backend."""

    @without_autocast
    def linear_cross_entropy(*arguments: Any) -> tuple[Tensor, ...]:
        return _cross_entropy(backend, *arguments)

    @without_autocast
    def linear_grpo_loss(*arguments: Any) -> tuple[Tensor, ...]:
        return _grpo_loss(backend, *arguments)

    return linear_cross_entropy, linear_grpo_loss


def _run(
    backend: str,
    hidden: Tensor,
    head: Head,
    targets: Targets,
    slopes: Callable[[Values, int, int], Slopes],
    needs_and_dtypes: tuple[Any, ...],
    sequence_length: int = 0,
) -> tuple[Values, Gradients]:
    gradients = Gradients(*empty_gradients(hidden, head.weight, head.lora_a, *needs_and_dtypes))
    needs = Needs(*needs_and_dtypes[:4])
    values = one_pass(hidden, head, targets, slopes, needs, gradients, sequence_length=sequence_length, backend=backend)
    return values, gradients


def _cross_entropy(
    backend: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    lora_scale: float,
    token_ids: Tensor,
    mask: Tensor | None,
    logit_scale: float,
    softcap: float,
    factor: Tensor,
    z_loss: float,
    *needs_and_dtypes: Any,
) -> tuple[Tensor, ...]:
    raise_if_outside("linear_cross_entropy", token_ids, mask, len(weight), "target")

    def slopes(values: Values, start: int, end: int) -> Slopes:
        rows = torch.ones_like(values.log_probs[start:end])
        penalty = None if z_loss == 0.0 else values.log_sum_exp[start:end] * (2.0 * z_loss * factor)
        return Slopes(rows * -factor, None, penalty)

    head = Head(weight, bias, lora_a, lora_b, lora_scale)
    targets = Targets(token_ids, mask, None, 1.0, logit_scale, softcap)
    values, gradients = _run(backend, hidden, head, targets, slopes, needs_and_dtypes)
    return values.log_probs, values.log_sum_exp, *gradients


def _grpo_loss(
    backend: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    lora_scale: float,
    token_ids: Tensor,
    mask: Tensor | None,
    temperature_tensor: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    ref_log_probs: Tensor | None,
    sampler_log_probs: Tensor | None,
    token_weights: Tensor | None,
    factors: Tensor,
    entropy_factor: Tensor | None,
    kl_coef_tensor: Tensor | None,
    kl_coef: float,
    sequence_length: int,
    options: list[int],
    parameters: list[float],
    *needs_and_dtypes: Any,
) -> tuple[Tensor, ...]:
    raise_if_outside("linear_grpo_loss", token_ids, mask, len(weight))
    live = live_rows(token_ids, mask)
    per_token = (old_log_probs, advantages, live, ref_log_probs, sampler_log_probs, token_weights)

    def slopes(values: Values, start: int, end: int) -> Slopes:
        shape = (-1, sequence_length) if sequence_length else (1, end - start)
        inputs = (None if value is None else value[start:end].view(shape) for value in (values.log_probs, *per_token))
        _, grad, _, _, _ = loss_ops.grpo_loss(
            *inputs, None, None, None, factors[start:end].view(shape), kl_coef_tensor, kl_coef, None, 0.0, None, 0.0,
            0, options, parameters, True, False, "native",
        )  # fmt: skip
        bonus = None if entropy_factor is None else torch.where(live[start:end], entropy_factor, 0.0)
        return Slopes(grad.view(-1), bonus)

    head = Head(weight, bias, lora_a, lora_b, lora_scale)
    targets = Targets(token_ids, mask, temperature_tensor, temperature, logit_scale, softcap)
    values, gradients = _run(backend, hidden, head, targets, slopes, needs_and_dtypes, sequence_length)
    return values.log_probs, values.entropy, *gradients
