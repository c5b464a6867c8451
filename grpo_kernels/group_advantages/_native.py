"""Group statistics through the C++ kernels, CPU or CUDA: allocates the outputs and calls the launcher."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels import _extension
from grpo_kernels._extension import DTYPE_CODE, pointer

# The kernels' numbers for the options: csrc/group_advantages/group_advantages.h
_BASELINE = {"mean": 0, "leave_one_out": 1, "none": 2, "length_weighted": 3, "second_best": 4}
_NORMALIZE_BY = {"group": 0, "batch": 1, "none": 2, "batch_tokens": 3}
_AGGREGATION = {"sum_then_normalize": 0, "normalize_then_sum": 1}
_SINGLETON = {"zero": 0, "raw": 1}


def _sorted_groups(group_ids: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Sample indices in the order of their groups, stably, and the ids in that order."""
    if group_ids is None:
        return None, None
    sorted_ids, order = torch.sort(group_ids.to(torch.int64), stable=True)
    return order, sorted_ids


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor | None,
    reward_weights: Tensor | None,
    lengths: Tensor | None,
    group_size: int,
    baseline: str,
    normalize_by: str,
    aggregation: str,
    singleton: str,
    eps: float,
    batch_eps: float,
    correction: int,
) -> tuple[Tensor, Tensor, Tensor]:
    rewards = rewards.contiguous()
    batch = rewards.shape[0]
    weights = None if reward_weights is None else reward_weights.to(torch.float64).contiguous()
    lengths = None if lengths is None else lengths.to(torch.float64).contiguous()
    order, sorted_ids = _sorted_groups(group_ids)
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    execution = _extension.execution(rewards)
    scratch = None  # on the CPU the launcher has its own
    if execution[0] >= 0:
        batch_statistic = normalize_by in ("batch", "batch_tokens") or aggregation == "normalize_then_sum"
        scratch = rewards.new_empty(batch * batch_statistic, dtype=torch.float64)
    advantages = rewards.new_empty(batch, dtype=dtype)
    mean, std = torch.empty_like(advantages), torch.empty_like(advantages)
    _extension.extension().group_advantages(
        rewards.data_ptr(),
        DTYPE_CODE[rewards.dtype],
        batch,
        rewards.shape[1] if rewards.ndim == 2 else 1,
        group_size,
        pointer(order),
        pointer(sorted_ids),
        pointer(weights),
        pointer(lengths),
        _BASELINE[baseline],
        _NORMALIZE_BY[normalize_by],
        _AGGREGATION[aggregation],
        _SINGLETON[singleton],
        correction,
        eps,
        batch_eps,
        pointer(scratch),
        advantages.data_ptr(),
        mean.data_ptr(),
        std.data_ptr(),
        *execution,
    )
    return advantages, mean, std


def informative_groups(
    rewards: Tensor, group_ids: Tensor | None, mask: Tensor | None, group_size: int, tolerance: float
) -> Tensor:
    rewards = rewards.contiguous()
    mask = None if mask is None else mask.contiguous()
    order, sorted_ids = _sorted_groups(group_ids)
    informative = rewards.new_empty(rewards.shape, dtype=torch.bool)
    _extension.extension().informative_groups(
        rewards.data_ptr(),
        DTYPE_CODE[rewards.dtype],
        rewards.shape[0],
        group_size,
        pointer(order),
        pointer(sorted_ids),
        pointer(mask),
        tolerance,
        informative.data_ptr(),
        *_extension.execution(rewards),
    )
    return informative


def group_rank(scores: Tensor, group_ids: Tensor | None, valid: Tensor | None, group_size: int) -> Tensor:
    scores = scores.contiguous()
    valid = None if valid is None else valid.contiguous()
    order, sorted_ids = _sorted_groups(group_ids)
    rank = scores.new_empty(scores.shape, dtype=torch.int32)
    _extension.extension().group_rank(
        scores.data_ptr(),
        DTYPE_CODE[scores.dtype],
        scores.shape[0],
        group_size,
        pointer(order),
        pointer(sorted_ids),
        pointer(valid),
        rank.data_ptr(),
        *_extension.execution(scores),
    )
    return rank
