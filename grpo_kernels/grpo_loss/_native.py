"""The GRPO loss through the C++ kernels, CPU or CUDA: allocates the outputs and calls the launcher."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels import _extension
from grpo_kernels.grpo_loss.ops import METRICS, NO_REDUCTION


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
    again, per_token = upstream is not None, options[2] == NO_REDUCTION
    with_grad = again or not per_token
    need_log_probs_grad = need_log_probs_grad and with_grad
    need_entropy_grad = need_entropy_grad and with_grad and entropy is not None

    # Outputs must not share memory, not even those of no elements. Sizes one by one are cheaper than a tuple of them.
    empty = log_probs.new_empty
    loss = empty(0) if again else empty(*shape) if per_token else empty(())
    grad_log_probs = empty(*shape) if need_log_probs_grad else empty(0)
    grad_entropy = empty(*shape) if need_entropy_grad else empty(0)
    scale = empty(0 if per_token else 2)
    metrics = empty(0 if again else METRICS, dtype=torch.float32)

    native, execution = _extension.extension(), _extension.execution(log_probs)
    workspace = counters = None  # on the CPU the launcher has its own
    if execution[0] >= 0:
        batch = shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        workspace_size, counters_size = native.grpo_loss_sizes(batch, shape[-1], cu_seqlens is not None)
        workspace, counters = empty(workspace_size, dtype=torch.float64), empty(counters_size, dtype=torch.int32)

    bad_row = native.grpo_loss(
        log_probs,
        old_log_probs,
        advantages,
        mask,
        ref_log_probs,
        sampler_log_probs,
        token_weights,
        entropy,
        entropy_threshold,
        selection,
        cu_seqlens,
        upstream,
        kl_coef_tensor,
        kl_coef,
        entropy_coef_tensor,
        entropy_coef,
        num_items_tensor,
        num_items,
        max_length,
        options,
        parameters,
        workspace,
        counters,
        None if again else loss,
        grad_log_probs if need_log_probs_grad else None,
        grad_entropy if need_entropy_grad else None,
        None if per_token else scale,
        None if again else metrics,
        *execution,
    )
    if bad_row >= 0 and cu_seqlens is not None:
        raise ValueError(
            f"grpo_loss: cu_seqlens must not decrease and must stay within [0, N] = [0, {shape[0]}], got "
            f"{int(cu_seqlens[bad_row])}, {int(cu_seqlens[bad_row + 1])} for sequence {bad_row}"
        )
    return loss, grad_log_probs, grad_entropy, scale, metrics
