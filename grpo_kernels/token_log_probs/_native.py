"""Log-probs through the C++ CPU kernels: allocates the outputs and calls the launcher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_kernels import _extension
from grpo_kernels.token_log_probs.layout import RowLayout, overwritable, raise_outside, readable
from grpo_kernels.token_log_probs.ops import empty_gradient, empty_outputs, result_dtype


def token_log_probs(
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor | None,
    temperature_tensor: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float,
    entropy: bool,
    sum_squared_probs: bool,
    top1_ids: bool,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    outputs = empty_outputs(logits, entropy, sum_squared_probs, top1_ids, statistics)
    logits, layout = readable(logits)
    bad_row = _extension.extension().token_log_probs(
        logits,
        layout,
        token_ids,
        mask,
        _temperatures(temperature_tensor, logits),
        temperature,
        logit_scale,
        softcap,
        outputs[0],
        outputs[1] if entropy else None,
        outputs[2] if sum_squared_probs else None,
        outputs[3] if top1_ids else None,
        outputs[4] if statistics else None,
        *_extension.execution(logits),
    )
    if bad_row >= 0:
        raise_outside("token_log_probs", token_ids, bad_row, logits.shape[-1])
    return outputs


def token_log_probs_backward(
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor | None,
    temperature_tensor: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float,
    statistics: Tensor,
    grad_log_probs: Tensor,
    grad_entropy: Tensor | None,
    grad_log_sum_exp: Tensor | None,
    grad_dtype: torch.dtype | None,
) -> Tensor:
    grad = empty_gradient(logits, None)
    logits, layout = readable(logits)
    grad_strides = (layout.inner * logits.shape[-1], logits.shape[-1])  # dense, indexed by the same two axes
    transform = (token_ids, mask, _temperatures(temperature_tensor, logits), temperature, logit_scale, softcap)
    upstream = (grad_log_probs, grad_entropy, grad_log_sum_exp)
    _launch_backward(logits, layout, transform, statistics, upstream, grad, grad_strides)
    return grad if grad_dtype is None else grad.to(grad_dtype)


def token_log_probs_backward_(
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor | None,
    temperature_tensor: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float,
    statistics: Tensor,
    grad_log_probs: Tensor,
    grad_entropy: Tensor | None,
    grad_log_sum_exp: Tensor | None,
) -> None:
    if not overwritable(logits):
        raise ValueError("token_log_probs_backward_: the rows of the logits cannot be overwritten where they lie")
    _, layout = readable(logits)
    transform = (token_ids, mask, _temperatures(temperature_tensor, logits), temperature, logit_scale, softcap)
    upstream = (grad_log_probs, grad_entropy, grad_log_sum_exp)
    strides = (layout.outer_stride, layout.inner_stride)
    _launch_backward(logits, layout, transform, statistics, upstream, logits, strides)
    torch.autograd.graph.increment_version(logits)


def _temperatures(temperatures: Tensor | None, logits: Tensor) -> Tensor | None:
    return None if temperatures is None else temperatures.to(result_dtype(logits))


def _launch_backward(
    logits: Tensor,
    layout: RowLayout,
    transform: tuple[Any, ...],
    statistics: Tensor,
    upstream: tuple[Tensor | None, ...],
    grad_logits: Tensor,
    grad_strides: tuple[int, int],
) -> None:
    _extension.extension().token_log_probs_backward(
        logits,
        layout,
        *transform,
        statistics,
        *(None if grad is None else grad.to(statistics.dtype) for grad in upstream),
        grad_logits,
        *grad_strides,
        *_extension.execution(grad_logits),
    )
