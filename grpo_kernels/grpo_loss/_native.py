"""The GRPO loss through the C++ kernels, CPU or CUDA: allocates the outputs and calls the launcher."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels import _extension
from grpo_kernels._extension import DTYPE_CODE, pointer
from grpo_kernels.grpo_loss.ops import METRICS, NO_REDUCTION

_ABSENT = (0, 0, 0)


def _dense(value: Tensor | None) -> Tensor | None:
    """The kernels stride over rows and take the last axis as it lies."""
    return value if value is None or value.stride(-1) == 1 or value.shape[-1] == 1 else value.contiguous()


def _place(value: Tensor | None, per_token: tuple[int, ...]) -> tuple[int, int, int]:
    """Address, and strides in elements from sequence to sequence and from token to token."""
    if value is None:
        return _ABSENT
    if value.shape != per_token:
        return value.data_ptr(), value.stride(0), 0
    return value.data_ptr(), value.stride(0) if value.ndim == 2 else 0, 1


def grpo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    ref_log_probs: Tensor | None,
    sampler_log_probs: Tensor | None,
    token_weights: Tensor | None,
    entropy: Tensor | None,
    entropy_threshold: Tensor | None,
    selection: Tensor | None,
    cu_seqlens: Tensor | None,
    upstream: Tensor | None,
    kl_coef_tensor: Tensor | None,
    kl_coef: float,
    entropy_coef_tensor: Tensor | None,
    entropy_coef: float,
    num_items_tensor: Tensor | None,
    num_items: float,
    max_length: int,
    options: list[int],
    parameters: list[float],
    need_log_probs_grad: bool,
    need_entropy_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape = log_probs.shape
    batch = shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    again, per_token = upstream is not None, options[2] == NO_REDUCTION
    with_grad = again or not per_token
    need_log_probs_grad = need_log_probs_grad and with_grad
    need_entropy_grad = need_entropy_grad and with_grad and entropy is not None

    def output(wanted: bool, *size: int) -> Tensor:  # outputs must not share memory, not even empty ones
        return log_probs.new_empty(size if wanted else (0,))

    loss = output(not again, *(shape if per_token else ()))
    grad_log_probs = output(need_log_probs_grad, *shape)
    grad_entropy = output(need_entropy_grad, *shape)
    scale = output(not per_token, 2)
    metrics = log_probs.new_empty(0 if again else METRICS, dtype=torch.float32)

    native, execution = _extension.extension(), _extension.execution(log_probs)
    workspace_size, counters_size = native.grpo_loss_sizes(batch, shape[-1], cu_seqlens is not None)
    workspace = log_probs.new_empty(workspace_size, dtype=torch.float64)
    counters = log_probs.new_empty(counters_size, dtype=torch.int32) if execution[0] >= 0 else None
    inputs = (
        log_probs,
        old_log_probs,
        advantages,
        mask,
        ref_log_probs,
        sampler_log_probs,
        token_weights,
        entropy,
        selection,
        upstream,
    )
    kept = [_dense(value) for value in inputs]  # copies must outlive the call
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()

    bad_row = native.grpo_loss(
        batch,
        shape[-1],
        pointer(cu_seqlens),
        cu_seqlens is not None and cu_seqlens.dtype == torch.int64,
        DTYPE_CODE[log_probs.dtype],
        0 if mask is None else mask.element_size(),
        [_place(value, shape) for value in kept],
        (
            (pointer(kl_coef_tensor), kl_coef),
            (pointer(entropy_coef_tensor), entropy_coef),
            (pointer(num_items_tensor), num_items),
            (pointer(entropy_threshold), 0.0),
        ),
        max_length,
        options,
        parameters,
        workspace.data_ptr(),
        pointer(counters),
        pointer(None if again else loss),
        grad_log_probs.data_ptr() if need_log_probs_grad else 0,
        grad_entropy.data_ptr() if need_entropy_grad else 0,
        pointer(None if per_token else scale),
        pointer(None if again else metrics),
        *execution,
    )
    if bad_row >= 0 and cu_seqlens is not None:
        raise ValueError(
            f"grpo_loss: cu_seqlens must not decrease and must stay within [0, N] = [0, {shape[0]}], got "
            f"{int(cu_seqlens[bad_row])}, {int(cu_seqlens[bad_row + 1])} for sequence {bad_row}"
        )
    return loss, grad_log_probs, grad_entropy, scale, metrics
