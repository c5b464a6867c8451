"""Group statistics in plain PyTorch: the definition, the oracle in float64, and the fallback on any device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def _group_index(batch: int, group_size: int, group_ids: Tensor | None, device: torch.device) -> Tensor:
    """[B] int64. For every sample the index of its group's first member, a name for the group that lies in [0, B)."""
    positions = torch.arange(batch, device=device)
    if group_ids is None:
        return positions // group_size * group_size
    if batch == 0:
        return positions
    sorted_ids, order = torch.sort(group_ids, stable=True)
    starts = torch.ones(batch, dtype=torch.bool, device=device)
    starts[1:] = sorted_ids[1:] != sorted_ids[:-1]
    first = torch.where(starts, positions, 0).cummax(0).values
    return torch.empty_like(order).scatter_(0, order, order[first])


def _group_sum(values: Tensor, index: Tensor) -> Tensor:
    """[B]. For every sample the sum over its group."""
    return torch.zeros_like(values).index_add_(0, index, values)[index]


def _group_extreme(values: Tensor, index: Tensor, reduce: str) -> Tensor:
    return torch.zeros_like(values).scatter_reduce_(0, index, values, reduce, include_self=False)[index]


def _statistics(
    values: Tensor, live: Tensor, index: Tensor, correction: int, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, deviation and count of the live members of every sample's group; 0 where there are none.

    With `lengths` a member counts as often as its response has tokens, and the count is theirs.
    """
    counts = live.to(values.dtype)
    if lengths is not None:
        counts = torch.where(live, lengths, 0.0)
        live = live & (lengths != 0)
    count = _group_sum(counts, index)
    positions = torch.arange(values.shape[0], device=values.device)
    first_live = _group_extreme(torch.where(live, positions, values.shape[0]), index, "amin")
    pivot = torch.where(
        _group_sum(live.to(values.dtype), index) > 0, values[first_live.clamp(max=values.shape[0] - 1)], 0.0
    )
    mean = pivot + _group_sum(torch.where(live, counts * (values - pivot), 0.0), index) / torch.where(
        count == 0, 1.0, count
    )
    squared = _group_sum(torch.where(live, counts * (values - mean) ** 2, 0.0), index)
    variance = squared / torch.where(count <= correction, 1.0, count - correction)
    std = torch.where(count <= correction, 0.0, variance.sqrt())
    return mean, std, count


def _second_best(values: Tensor, live: Tensor, index: Tensor) -> Tensor:
    """The second largest live value of every sample's group, which is the largest where that one is tied."""
    lowest = torch.full_like(values, float("-inf"))
    best = _group_extreme(torch.where(live, values, lowest), index, "amax")
    is_best = live & (values == best)
    below = _group_extreme(torch.where(live & ~is_best, values, lowest), index, "amax")
    return torch.where(_group_sum(is_best.to(values.dtype), index) > 1, best, below)


class _Options(NamedTuple):
    """Options of `group_advantages` that concern a group, and the lengths in float64."""

    baseline: str
    scale_by_group: bool
    singleton: str
    eps: float
    correction: int
    lengths: Tensor | None


def _apply_singleton(mean: Tensor, std: Tensor, count: Tensor, singleton: str) -> tuple[Tensor, Tensor]:
    if singleton == "zero":
        return mean, std
    return torch.where(count == 1, 0.0, mean), torch.where(count == 1, 1.0, std)


def _centred(values: Tensor, live: Tensor, index: Tensor, mean: Tensor, count: Tensor, options: _Options) -> Tensor:
    difference = values if options.baseline == "none" else values - mean
    if options.baseline == "leave_one_out":
        difference = difference * (count / (count - 1.0).clamp(min=1.0))
    elif options.baseline == "length_weighted":
        weighted_mean, _, tokens = _statistics(values, live, index, 0, options.lengths)
        difference = torch.where(tokens == 0, 0.0, values - weighted_mean)
    elif options.baseline == "second_best":
        shift = torch.where(mean.isfinite(), _second_best(values, live, index), float("nan"))
        difference = torch.where(values <= shift, 0.0, values - shift)
    if options.baseline == "none" and not options.scale_by_group:
        return difference
    return torch.where(count == 1, values if options.singleton == "raw" else torch.zeros_like(values), difference)


def _scaled(difference: Tensor, divisor: Tensor) -> Tensor:
    return torch.where(difference == 0, 0.0, difference / divisor)


def _of_group(values: Tensor, live: Tensor, index: Tensor, options: _Options) -> tuple[Tensor, Tensor, Tensor]:
    """Advantages of one reward in its groups, with the groups' means and deviations."""
    mean, std, count = _statistics(values, live, index, options.correction)
    mean, std = _apply_singleton(mean, std, count, options.singleton)
    difference = _centred(values, live, index, mean, count, options)
    return _scaled(difference, std + options.eps) if options.scale_by_group else difference, mean, std


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
    """Advantages, group means and group deviations, each [B]; see `api.group_advantages` for the arguments."""
    out_dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    r = rewards.detach().to(torch.float64)
    r = r[:, None] if r.ndim == 1 else r
    index = _group_index(r.shape[0], group_size, group_ids, r.device)
    everyone = torch.zeros_like(index)
    weights = r.new_ones(r.shape[1]) if reward_weights is None else reward_weights.to(torch.float64)
    if lengths is not None:
        lengths = lengths.to(torch.float64)
        lengths = torch.where((lengths >= 0) & lengths.isfinite(), lengths, float("nan"))
    scored = ~r.isnan()
    live = scored.any(dim=1)
    total = torch.where(scored, r * weights, 0.0).sum(dim=1)
    finite = live & ~total.isnan()  # infinities of both signs add up to NaN: no statistic, but a NaN advantage

    decoupled = aggregation == "normalize_then_sum"
    options = _Options(baseline, decoupled or normalize_by == "group", singleton, eps, correction, lengths)
    advantages, mean, std = _of_group(total, finite, index, options)
    if decoupled:
        advantages = torch.zeros_like(total)
        for k in range(r.shape[1]):
            z = _of_group(r[:, k], scored[:, k], index, options)[0]
            advantages = advantages + torch.where(scored[:, k], weights[k] * z, 0.0)
    if normalize_by == "batch":
        advantages = _scaled(advantages, _statistics(total, finite, everyone, correction)[1] + batch_eps)
    elif decoupled or normalize_by == "batch_tokens":
        by_tokens = normalize_by == "batch_tokens"
        known = live & ~advantages.isnan()
        shift, spread, _ = _statistics(advantages, known, everyone, correction, lengths if by_tokens else None)
        divisor = (spread.square() + batch_eps).sqrt() if by_tokens else spread + batch_eps
        advantages = _scaled(advantages - shift, divisor)
    advantages = torch.where(live, advantages, 0.0)
    return advantages.to(out_dtype), mean.to(out_dtype), std.to(out_dtype)


def informative_groups(
    rewards: Tensor, group_ids: Tensor | None, mask: Tensor | None, group_size: int, tolerance: float
) -> Tensor:
    """[B] bool. Whether the live rewards of the sample's group differ by more than `tolerance`."""
    r = rewards.detach().to(torch.float64)
    index = _group_index(r.shape[0], group_size, group_ids, r.device)
    live = ~r.isnan() if mask is None else ~r.isnan() & mask
    infinite = torch.full_like(r, float("inf"))
    low = _group_extreme(torch.where(live, r, infinite), index, "amin")
    high = _group_extreme(torch.where(live, r, -infinite), index, "amax")
    return (_group_sum(live.to(r.dtype), index) > 0) & (high - low > tolerance)


def group_rank(scores: Tensor, group_ids: Tensor | None, valid: Tensor | None, group_size: int) -> Tensor:
    """[B] int32. Rank within the group, 0 the best, ties to the lower index; -1 for a sample that is not valid."""
    s = scores.detach().to(torch.float64)
    batch = s.shape[0]
    live = ~s.isnan() if valid is None else ~s.isnan() & valid
    index = _group_index(batch, group_size, group_ids, s.device)
    order = torch.argsort(torch.where(live, s, float("-inf")), descending=True, stable=True)
    order = order[
        torch.argsort((~live)[order].to(torch.int8), stable=True)
    ]  # a live score of -inf still beats an invalid one
    order = order[torch.argsort(index[order], stable=True)]
    positions = torch.arange(batch, device=s.device)
    grouped = index[order]
    starts = torch.ones(batch, dtype=torch.bool, device=s.device)
    starts[1:] = grouped[1:] != grouped[:-1]
    first = torch.where(starts, positions, 0).cummax(0).values if batch else positions
    rank = torch.empty_like(positions).scatter_(0, order, positions - first)
    return torch.where(live, rank, -1).to(torch.int32)
