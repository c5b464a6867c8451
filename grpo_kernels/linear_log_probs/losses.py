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
from grpo_kernels.linear_log_probs.row_values import Slopes, Targets, Values, joined
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
    top1_ids: bool = False,
) -> tuple[Values, Gradients]:
    gradients = Gradients(*empty_gradients(hidden, head.weight, head.lora_a, *needs_and_dtypes))
    needs = Needs(*needs_and_dtypes[:4])
    values = one_pass(
        hidden, head, targets, slopes, needs, gradients, sequence_length=sequence_length, top1_ids=top1_ids,
        backend=backend,
    )  # fmt: skip
    return values, gradients


def _or_empty(top1_ids: Tensor | None, hidden: Tensor) -> Tensor:
    return hidden.new_empty(0, dtype=torch.int64) if top1_ids is None else top1_ids


def _cross_entropy_slopes(values: Values, start: int, end: int, factor: Tensor, z_loss: float) -> Slopes:
    """Of factor * (z_loss * log_sum_exp^2 - log_prob); the factor is 0-d or that of the rows start to end."""
    rows = torch.ones_like(values.log_probs[start:end])
    penalty = None if z_loss == 0.0 else values.log_sum_exp[start:end] * (2.0 * z_loss * factor)
    return Slopes(rows * -factor, None, penalty)


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
    temperature_tensor: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float,
    factor: Tensor,
    z_loss: float,
    top1_ids: bool,
    *needs_and_dtypes: Any,
) -> tuple[Tensor, ...]:
    raise_if_outside("linear_cross_entropy", token_ids, mask, len(weight), "target")

    def slopes(values: Values, start: int, end: int) -> Slopes:
        return _cross_entropy_slopes(values, start, end, factor[start:end] if factor.ndim else factor, z_loss)

    head = Head(weight, bias, lora_a, lora_b, lora_scale)
    targets = Targets(token_ids, mask, temperature_tensor, temperature, logit_scale, softcap)
    values, gradients = _run(backend, hidden, head, targets, slopes, needs_and_dtypes, top1_ids=top1_ids)
    return values.log_probs, values.log_sum_exp, _or_empty(values.top1_ids, hidden), *gradients


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
    cross_entropy_factors: Tensor | None,
    z_loss: float,
    top1_ids: bool,
    *needs_and_dtypes: Any,
) -> tuple[Tensor, ...]:
    raise_if_outside("linear_grpo_loss", token_ids, mask, len(weight))
    live = live_rows(token_ids, mask)
    per_token = (old_log_probs, advantages, live, ref_log_probs, sampler_log_probs, token_weights)
    tokens = len(factors)  # rows behind them carry cross-entropy

    def policy_slopes(values: Values, start: int, end: int) -> Slopes:
        shape = (-1, sequence_length) if sequence_length else (1, end - start)
        inputs = (None if value is None else value[start:end].view(shape) for value in (values.log_probs, *per_token))
        _, grad, _, _, _ = loss_ops.grpo_loss(
            *inputs, None, None, None, None, factors[start:end].view(shape), kl_coef_tensor, kl_coef, None, 0.0, None,
            0.0, 0, options, parameters, True, False, "native",
        )  # fmt: skip
        if entropy_factor is None:
            return Slopes(grad.view(-1), None)
        return Slopes(grad.view(-1), torch.where(live[start:end], entropy_factor.expand(tokens)[start:end], 0.0))

    def slopes(values: Values, start: int, end: int) -> Slopes:
        if cross_entropy_factors is None or end <= tokens:
            return policy_slopes(values, start, end)
        begin = max(start, tokens)
        factor = cross_entropy_factors[begin - tokens : end - tokens]
        others = _cross_entropy_slopes(values, begin, end, factor, z_loss)
        if start >= tokens:
            return others
        return joined(policy_slopes(values, start, tokens), others)

    head = Head(weight, bias, lora_a, lora_b, lora_scale)
    targets = Targets(token_ids, mask, temperature_tensor, temperature, logit_scale, softcap)
    values, gradients = _run(backend, hidden, head, targets, slopes, needs_and_dtypes, sequence_length, top1_ids)
    return values.log_probs, values.entropy, values.log_sum_exp, _or_empty(values.top1_ids, hidden), *gradients
