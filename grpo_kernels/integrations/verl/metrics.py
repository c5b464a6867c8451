"""Statistics of the loss under verl's names and in verl's sense."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from grpo_kernels.grpo_loss import GRPOLossConfig
from grpo_kernels.grpo_loss.metrics import NAMES

_NOTHING = ("gpg",)
_KL_ALONE = ("kl_cov", "dro")


@torch.no_grad()
def verl_metrics(
    name: str,
    config: GRPOLossConfig,
    values: Tensor,
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    mask: Tensor,
) -> dict[str, float]:
    """What verl's function of this mode returns beside the loss: shares and means over the live tokens.

    One transfer to the host for all of them. verl reads every metric on the host as soon as it gets it, so that tensors
    would be one transfer each.
    """
    if name in _NOTHING:
        return {}
    extra = _own_sums(name, config, log_prob, old_log_prob, advantages, mask)
    numbers = torch.cat([values, torch.stack(extra)] if extra else [values]).tolist()
    v = dict(zip(NAMES, numbers, strict=False))
    own = numbers[len(NAMES) :]
    tokens = max(v["tokens"], 1.0)
    clip, lower, drift = v["clip_low"] + v["clip_high"], v["capped"], -v["log_ratio"]
    if name == "kl_cov":
        (drift,) = own
    elif extra:
        clip, lower = own
    found = {"actor/ppo_kl": drift / tokens}
    if name in _KL_ALONE:
        return found
    if name == "clip_cov":  # the tokens that were drawn
        return {"actor/pg_clipfrac": lower / tokens, **found}
    return {"actor/pg_clipfrac": clip / tokens, **found, "actor/pg_clipfrac_lower": lower / tokens}


def _own_sums(
    name: str, config: GRPOLossConfig, log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, mask: Tensor
) -> list[Tensor]:
    """Where verl counts other tokens than the kernel: 0-d float32 each, of the live tokens.

    verl's "cispo" and "geo_mean" count a ratio out of its range on either side, whatever the advantage's sign.
    """
    if name not in ("kl_cov", "cispo", "geo_mean"):
        return []
    live = mask != 0
    gap = torch.where(live, log_prob - old_log_prob, 0.0)
    if name == "kl_cov":
        return [gap.abs().sum().float()]
    low, high = cast("tuple[float, float]", config.ratio_bounds)  # verl has no clip range with an open side
    if name == "cispo":
        low, high = (math.log(low) if low > 0 else -math.inf), math.log(high)
    outside = (gap < low) | (gap > high)
    if name == "cispo":
        return [outside.sum().float(), gap.new_zeros((), dtype=torch.float32)]
    return [(outside & (advantages > 0)).sum().float(), (outside & (advantages < 0)).sum().float()]
