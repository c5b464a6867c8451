"""Log-probs through the C++ CPU kernels: allocates the outputs and calls the launcher."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels import _extension
from grpo_kernels._extension import DTYPE_CODE, pointer
from grpo_kernels.token_log_probs.layout import RowLayout, dense, overwritable, raise_outside, readable
from grpo_kernels.token_log_probs.ops import empty_gradient, empty_outputs, result_dtype


def _transform(
    logits: Tensor,
    layout: RowLayout,
    token_ids: Tensor,
    mask: Tensor | None,
    temperature_tensor: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float,
) -> tuple[tuple[int | float | bool, ...], tuple[Tensor | None, ...]]:
    """The arguments that forward and backward share, and the tensors that they point into."""
    ids = token_ids.contiguous()
    live = None if mask is None else mask.contiguous()
    temperatures = None if temperature_tensor is None else dense(temperature_tensor, result_dtype(logits))
    per_row = temperatures is not None and temperatures.ndim > 0
    arguments = (
        *layout,
        logits.shape[-1],
        DTYPE_CODE[logits.dtype],
        ids.data_ptr(),
        ids.dtype == torch.int64,
        pointer(live),
        pointer(temperatures),
        per_row,
        temperature,
        logit_scale,
        softcap,
        logits.data_ptr(),
    )
    return arguments, (ids, live, temperatures)


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
    arguments, alive = _transform(
        logits, layout, token_ids, mask, temperature_tensor, temperature, logit_scale, softcap
    )
    bad_row = _extension.extension().token_log_probs(
        *arguments,
        outputs[0].data_ptr(),
        outputs[1].data_ptr() if entropy else 0,
        outputs[2].data_ptr() if sum_squared_probs else 0,
        outputs[3].data_ptr() if top1_ids else 0,
        outputs[4].data_ptr() if statistics else 0,
        *_extension.execution(logits),
    )
    del alive
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
    arguments, alive = _transform(
        logits, layout, token_ids, mask, temperature_tensor, temperature, logit_scale, softcap
    )
    upstream = (grad_log_probs, grad_entropy, grad_log_sum_exp)
    _launch_backward(arguments, statistics, upstream, grad, grad_strides)
    del alive
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
    arguments, alive = _transform(
        logits, layout, token_ids, mask, temperature_tensor, temperature, logit_scale, softcap
    )
    upstream = (grad_log_probs, grad_entropy, grad_log_sum_exp)
    _launch_backward(arguments, statistics, upstream, logits, (layout.outer_stride, layout.inner_stride))
    del alive
    torch.autograd.graph.increment_version(logits)


def _launch_backward(
    arguments: tuple[int | float | bool, ...],
    statistics: Tensor,
    upstream: tuple[Tensor | None, ...],
    grad_logits: Tensor,
    grad_strides: tuple[int, int],
) -> None:
    upstream = tuple(None if grad is None else dense(grad, statistics.dtype) for grad in upstream)
    statistics = statistics.contiguous()
    _extension.extension().token_log_probs_backward(
        *arguments,
        statistics.data_ptr(),
        *map(pointer, upstream),
        grad_logits.data_ptr(),
        *grad_strides,
        *_extension.execution(grad_logits),
    )
