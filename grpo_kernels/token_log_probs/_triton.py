"""Log-probs through Triton: the launchers."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor

from grpo_kernels._extension import pointer
from grpo_kernels._math_triton import host_factors
from grpo_kernels.token_log_probs._kernels_triton import backward_kernel, forward_kernel, launch_config
from grpo_kernels.token_log_probs.layout import dense, overwritable, readable
from grpo_kernels.token_log_probs.ops import empty_gradient, empty_outputs


def _device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _aligned(tensor: Tensor, *strides: int) -> bool:
    """Whether every row starts at a multiple of 16 bytes, and Triton can know: it sees multiples of 16 elements."""
    return pointer(tensor) % 16 == 0 and all(stride % 16 == 0 for stride in strides)


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
    if layout.rows == 0:
        return outputs
    vocab = logits.shape[-1]
    aligned = _aligned(logits, layout.outer_stride, layout.inner_stride)
    config = launch_config(vocab, logits.element_size(), aligned)
    in_factor, in_low, out_factor, kind = host_factors(temperature_tensor, temperature, logit_scale, softcap)
    with _device(logits):
        forward_kernel[(layout.rows,)](
            logits,
            token_ids.contiguous(),
            None if mask is None else mask.contiguous(),
            None if temperature_tensor is None else dense(temperature_tensor, torch.float32),
            *outputs,
            in_factor,
            in_low,
            out_factor,
            layout.rows,
            vocab,
            layout.inner,
            layout.outer_stride,
            layout.inner_stride,
            HAS_MASK=mask is not None,
            TEMPERATURE=kind,
            CAPPED=softcap > 0.0,
            ENTROPY=entropy,
            SQUARED=sum_squared_probs,
            TOP1=top1_ids,
            STATISTICS=statistics,
            SLOTS=config.slots,
            WIDTH=config.width,
            NEIGHBOURS=config.neighbours,
            num_warps=config.num_warps,
        )
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
    grad = empty_gradient(logits, grad_dtype)
    options = (token_ids, mask, temperature_tensor, temperature, logit_scale, softcap)
    _launch_backward(logits, grad, *options, statistics, grad_log_probs, grad_entropy, grad_log_sum_exp)
    return grad


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
    options = (token_ids, mask, temperature_tensor, temperature, logit_scale, softcap)
    _launch_backward(logits, logits, *options, statistics, grad_log_probs, grad_entropy, grad_log_sum_exp)
    torch.autograd.graph.increment_version(logits)


def _launch_backward(
    logits: Tensor,
    grad: Tensor,
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
    """`grad` is a dense tensor, or the logits themselves."""
    in_place = grad is logits
    logits, layout = readable(logits)
    if layout.rows == 0:
        return
    vocab = logits.shape[-1]
    outer_stride = layout.outer_stride if in_place else layout.inner * vocab * (layout.inner < layout.rows)
    inner_stride = layout.inner_stride if in_place else vocab
    aligned = _aligned(logits, layout.outer_stride, layout.inner_stride) and _aligned(grad, outer_stride, inner_stride)
    config = launch_config(vocab, logits.element_size(), aligned)
    in_factor, in_low, out_factor, kind = host_factors(temperature_tensor, temperature, logit_scale, softcap)
    columns = config.slots * config.width * config.blocks_per_program
    with _device(logits):
        backward_kernel[(layout.rows, triton.cdiv(vocab, columns))](
            logits,
            token_ids.contiguous(),
            None if mask is None else mask.contiguous(),
            None if temperature_tensor is None else dense(temperature_tensor, torch.float32),
            statistics.contiguous(),
            dense(grad_log_probs, torch.float32),
            None if grad_entropy is None else dense(grad_entropy, torch.float32),
            None if grad_log_sum_exp is None else dense(grad_log_sum_exp, torch.float32),
            grad,
            in_factor,
            in_low,
            out_factor,
            layout.rows,
            vocab,
            layout.inner,
            layout.outer_stride,
            layout.inner_stride,
            outer_stride,
            inner_stride,
            HAS_MASK=mask is not None,
            TEMPERATURE=kind,
            CAPPED=softcap > 0.0,
            ENTROPY=grad_entropy is not None,
            LOG_SUM_EXP=grad_log_sum_exp is not None,
            BLOCKS=config.blocks_per_program,
            SLOTS=config.slots,
            WIDTH=config.width,
            NEIGHBOURS=config.neighbours,
            num_warps=config.num_warps,
        )
