"""The GRPO loss through the C++ kernels, CPU or CUDA: allocates the outputs and calls the launcher."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels import _extension
from grpo_kernels._extension import DTYPE_CODE, pointer
from grpo_kernels.grpo_loss.ops import METRICS, NO_REDUCTION

_ABSENT = (0, 0, 0)


def _place(value: Tensor | None, shape: torch.Size, kept: list[Tensor]) -> tuple[int, int, int]:
    """Address, and strides in elements from sequence to sequence and from token to token.

    The kernels stride over rows and take the last axis as it lies: where it does not, `kept` keeps a copy alive.
    """
    if value is None:
        return _ABSENT
    strides = value.stride()
    if strides[-1] != 1 and value.shape[-1] != 1:
        value = value.contiguous()
        kept.append(value)
        strides = value.stride()
    if value.shape != shape:
        return value.data_ptr(), strides[0], 0
    return value.data_ptr(), strides[0] if len(strides) == 2 else 0, 1


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

    empty = log_probs.new_empty  # outputs must not share memory, not even those of no elements
    loss = empty(shape if per_token and not again else (0,) if again else ())
    grad_log_probs = empty(shape) if need_log_probs_grad else empty(0)
    grad_entropy = empty(shape) if need_entropy_grad else empty(0)
    scale = empty(0 if per_token else 2)
    metrics = empty(0 if again else METRICS, dtype=torch.float32)

    native, execution = _extension.extension(), _extension.execution(log_probs)
    workspace = counters = None  # on the CPU the launcher has its own
    if execution[0] >= 0:
        workspace_size, counters_size = native.grpo_loss_sizes(batch, shape[-1], cu_seqlens is not None)
        workspace, counters = empty(workspace_size, dtype=torch.float64), empty(counters_size, dtype=torch.int32)
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
    kept: list[Tensor] = []
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()

    bad_row = native.grpo_loss(
        batch,
        shape[-1],
        pointer(cu_seqlens),
        cu_seqlens is not None and cu_seqlens.dtype == torch.int64,
        DTYPE_CODE[log_probs.dtype],
        0 if mask is None else mask.element_size(),
        [_place(value, shape, kept) for value in inputs],
        (
            (pointer(kl_coef_tensor), kl_coef),
            (pointer(entropy_coef_tensor), entropy_coef),
            (pointer(num_items_tensor), num_items),
            (pointer(entropy_threshold), 0.0),
        ),
        max_length,
        options,
        parameters,
        pointer(workspace),
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
