"""Row statistics of a vocabulary in parts: slices, the splits of a kernel, ranks. Plain PyTorch over [N] numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAXIMUM, TOTAL, TARGET, WEIGHTED = range(4)
"""Rows of the statistics: max z, sum of e^u, target's z, sum of u e^u, where u = z - max z. A part that does not hold a
row's target says +inf for it; one with nothing but -inf has maximum -inf and sums 0."""

ABSENT = math.inf


def merge(
    values: Tensor, squared: Tensor | None, top1_ids: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The statistics of the whole vocabulary from those of its parts, merged in their order.

    Args:
        values: [P, 4, N] float. Statistics of the parts.
        squared: [P, N] float. Sum of e^2u, or None.
        top1_ids: [P, N] int64. The likeliest token of each part, or None.

    Returns:
        ([4, N], [N] or None, [N] or None). A target that no part holds stays +inf: merged, the parts are a part.
    """
    maxima, totals, targets, weighted = values.unbind(1)
    top = maxima.amax(0)
    shift = maxima - torch.where(top == -math.inf, 0.0, top)
    factor = shift.exp()
    bounded = torch.where(shift == -math.inf, 0.0, shift)
    absent = targets == ABSENT
    target = torch.where(absent.all(0), ABSENT, torch.where(absent, -math.inf, targets).amax(0))
    merged = torch.stack([top, (totals * factor).sum(0), target, ((weighted + bounded * totals) * factor).sum(0)])
    if squared is not None:
        squared = (squared * factor * factor).sum(0)
    if top1_ids is not None:
        best = (maxima == top) & (top1_ids >= 0)
        lowest = torch.where(best, top1_ids, torch.iinfo(top1_ids.dtype).max).amin(0)
        top1_ids = torch.where(best.any(0), lowest, -1)
    return merged, squared, top1_ids


def finish(
    values: Tensor, squared: Tensor | None, top1_ids: Tensor | None, live: Tensor, entropy: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """log_probs, entropy, sum of squared probabilities and top-1 id from the statistics [4, ...] of whole rows.

    NaN where a row has no or an infinite sum, or a target that no part holds.
    """
    top, total, target, weighted = values.unbind(0)
    sound = (total > 0) & (total < math.inf) & (target != ABSENT)
    log_total = total.log()

    def per_row(value: Tensor) -> Tensor:
        return torch.where(live, torch.where(sound, value, math.nan), 0.0)

    return (
        per_row((target - top) - log_total),
        per_row(log_total - weighted / total) if entropy else None,
        None if squared is None else per_row(squared / total / total),
        None if top1_ids is None else torch.where(live & sound, top1_ids, -1),
    )
