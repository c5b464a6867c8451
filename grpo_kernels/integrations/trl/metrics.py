"""The statistics of a loss call under the names that TRL logs them by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels.grpo_loss import GRPOMetrics
from grpo_kernels.grpo_loss.metrics import NAMES

_CLIPPING = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
_COLUMNS = (*NAMES, "batch", "phi", "phi_count", "unregularized_loss")


class Kind(NamedTuple):
    """Which statistics there are, and what is counted."""

    loss_type: str
    per_sequence: bool  # ratios and advantages are of sequences: TRL counts those, not tokens
    with_kl: bool
    with_bonus: bool


def statistics(metrics: GRPOMetrics, batch: int, phi: Tensor | None, unregularized_loss: Tensor | None) -> Tensor:
    """`[1, 34] float32`: what `logged` takes of one process, on the device of the loss.

    Args:
        metrics: of the loss call.
        batch: sequences, empty ones too.
        phi: VESPO's sum of weights and their number, `[2] float`.
        unregularized_loss: 0-d, the loss without its entropy bonus.
    """
    values = metrics.values
    absent = values.new_zeros(())
    others = [
        values.new_full((1,), batch),
        values.new_zeros(2) if phi is None else phi.to(values.dtype),
        (absent if unregularized_loss is None else unregularized_loss).to(values.dtype)[None],
    ]
    return torch.cat([values, *others])[None]


def logged(rows: Sequence[Sequence[float]], kind: Kind) -> dict[str, float]:
    """What TRL logs of one loss call, given the `statistics` of all processes. NaN: nothing to log."""
    ranks = [dict(zip(_COLUMNS, row, strict=True)) for row in rows]
    total = {name: math.fsum(rank[name] for rank in ranks) for name in _COLUMNS}
    tokens = max(total["tokens"], 1.0)
    result = {"entropy": total["entropy"] / tokens}
    if kind.with_kl:
        result["kl"] = total["kl"] / tokens
    if kind.with_bonus:
        losses = [rank["unregularized_loss"] for rank in ranks if not math.isnan(rank["unregularized_loss"])]
        result["policy_loss"] = math.fsum(losses) / len(losses) if losses else math.nan
    count, suffix = (max(total["batch"], 1.0), "_rows") if kind.per_sequence else (tokens, "")
    low, high = total["clip_low" + suffix], total["clip_high" + suffix]
    if kind.loss_type in _CLIPPING:
        result["clip_ratio/low_mean"] = low / count
        result["clip_ratio/high_mean"] = high / count
        result["clip_ratio/region_mean"] = (low + high) / count
        result["clip_ratio/low_min"] = min(_shares(ranks, "clip_low_row_min", kind), default=math.nan)
        result["clip_ratio/high_max"] = max(_shares(ranks, "clip_high_row_max", kind), default=math.nan)
    elif kind.loss_type == "cispo":
        result["cispo_clip_ratio"] = high / count
    elif kind.loss_type == "vespo":
        result["vespo/phi_seq_mean"] = total["phi"] / max(total["phi_count"], 1.0)
    return result


def _shares(ranks: list[dict[str, float]], name: str, kind: Kind) -> list[float]:
    """The extreme share of clipped tokens of each process that has any sequence to count."""
    found = [rank[name] for rank in ranks if math.isfinite(rank[name])]
    if kind.per_sequence and any(rank["sequences"] < rank["batch"] for rank in ranks):
        found.append(0.0)  # TRL counts an empty sequence as one that is not clipped
    return found
