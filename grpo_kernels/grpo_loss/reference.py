"""The definition of the GRPO loss in plain differentiable PyTorch: the oracle in float64, and the fallback on any
device.

Nothing here depends on the data in Python's control flow, so torch.compile traces it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from grpo_kernels.grpo_loss.choices import DIVERGENCES
from grpo_kernels.grpo_loss.rows import LossInputs, Rows, rows_of
from grpo_kernels.grpo_loss.terms import (
    TokenParts,
    bounded,
    evidence,
    gap,
    gate,
    kl_term,
    log_ratios,
    policy_term,
    sampler_weight,
    times,
    vespo_weight,
    within_divergence,
)

if TYPE_CHECKING:
    from grpo_kernels.grpo_loss.config import GRPOLossConfig


class _Terms(NamedTuple):
    """Per-token quantities, all [B, T] or [N]."""

    rows: Rows
    parts: TokenParts
    policy: Tensor  # differentiable
    kl: Tensor | None  # differentiable
    entropy_live: Tensor  # the tokens that the entropy mask keeps
    sampler_weight: Tensor | None
    dropped: Tensor  # by the off-policy mask


def _terms(inputs: LossInputs, config: GRPOLossConfig, kl_coef: Tensor) -> _Terms:
    rows = rows_of(inputs.log_probs, inputs.mask, inputs.cu_seqlens)
    live = rows.live
    lp = torch.where(live, inputs.log_probs, 0)
    old = lp.detach() if inputs.old_log_probs is None else torch.where(live, inputs.old_log_probs, 0)
    sampler = None if inputs.sampler_log_probs is None else torch.where(live, inputs.sampler_log_probs, 0)
    advantage = rows.to_tokens(inputs.advantages)
    token_gap = gap(lp, old)
    log_ratio = log_ratios(config, rows, lp, token_gap, advantage)

    factor = torch.ones_like(lp) if inputs.token_weights is None else rows.to_tokens(inputs.token_weights)
    dropped = torch.zeros_like(live)
    if config.off_policy_threshold is not None:
        length = rows.lengths(lp).clamp(min=1)
        drift = rows.spread(rows.sum(evidence(old if sampler is None else sampler, lp.detach())) / length)
        dropped = live & ~((advantage >= 0) | (drift <= config.off_policy_threshold))
        factor = torch.where(dropped, 0, factor)
    entropy_live = live
    if inputs.entropy is not None and inputs.entropy_threshold is not None:
        entropy_live = live & (inputs.entropy.detach() >= inputs.entropy_threshold)
        factor = torch.where(entropy_live, factor, 0)
    selected = None if inputs.selection is None else live & (inputs.selection != 0)
    if config.surrogate == "clip_cov" and selected is not None:
        factor = torch.where(selected, 0, factor)
    correction, log_correction = None, None
    if sampler is not None:
        correction, log_correction = sampler_weight(config, rows, old, sampler)
        if config.sampler_correction == "none":
            log_correction = None
        elif config.surrogate != "vespo":
            factor = times(factor, correction)

    phi = None
    if config.surrogate == "vespo":
        phi = vespo_weight(config, rows, token_gap.detach(), log_correction, advantage)
    parts = TokenParts(lp, old, token_gap, log_ratio, advantage, factor, times(advantage, factor), phi, selected)
    kl = None
    if inputs.ref_log_probs is not None:
        counted = (kl_coef != 0).expand(live.shape)  # nothing reaches the gradient through a term with coefficient 0
        ref = torch.where(live, inputs.ref_log_probs, 0)
        kl = kl_term(config, gate(lp, counted), ref, gate(log_ratio, counted).exp())
    return _Terms(rows, parts, policy_term(config, parts), kl, entropy_live, correction, dropped)


def grpo_loss(inputs: LossInputs, config: GRPOLossConfig) -> tuple[Tensor, Tensor]:
    """The loss, 0-d or per token, differentiable in log_probs and entropy, and the values of `GRPOMetrics`."""
    like = inputs.log_probs
    kl_coef, entropy_coef, num_items = (
        _scalar(value, like) for value in (inputs.kl_coef, inputs.entropy_coef, inputs.num_items)
    )
    terms = _terms(inputs, config, kl_coef)
    rows = terms.rows
    token_loss = terms.policy
    if terms.kl is not None:
        token_loss = token_loss + torch.where(kl_coef == 0, 0, kl_coef * terms.kl)
    token_loss = torch.where(rows.live, token_loss, 0)
    values = _metrics(inputs, config, terms, token_loss)

    bonus = None
    if inputs.entropy is not None:
        entropy = torch.where(terms.entropy_live & (entropy_coef != 0), inputs.entropy, 0)
        bonus = entropy_coef * entropy
    if bonus is not None and (config.reduction == "none" or config.entropy_reduction == "loss"):
        token_loss, bonus = token_loss - bonus, None
    if config.reduction == "none":
        return token_loss, values
    loss = _reduce(config, rows, token_loss, num_items, inputs.max_length or like.shape[-1])
    if bonus is not None:
        loss = loss - bonus.sum() / terms.entropy_live.sum().clamp(min=1)
    return loss, values


def _scalar(value: Tensor | float, like: Tensor) -> Tensor:
    return value.to(like.dtype) if isinstance(value, Tensor) else like.new_full((), value)


def _reduce(config: GRPOLossConfig, rows: Rows, token_loss: Tensor, num_items: Tensor, max_length: int) -> Tensor:
    if config.reduction == "token_sum":
        return token_loss.sum()
    tokens = rows.live.sum().clamp(min=1).to(token_loss.dtype)
    if config.reduction == "token_mean":
        return token_loss.sum() / torch.where(num_items > 0, num_items, tokens)
    per_sequence = rows.sum(token_loss)
    if config.reduction == "sequence_mean_token_mean":
        per_sequence = per_sequence / rows.lengths(token_loss).clamp(min=1)
    elif config.reduction == "sequence_mean_token_sum_norm":
        per_sequence = per_sequence / max(max_length, 1)
    count: Tensor | int = max(rows.batch, 1)
    if config.skip_empty_sequences:
        count = (rows.lengths(token_loss) > 0).sum().clamp(min=1)
    return per_sequence.sum() / torch.where(num_items > 0, num_items, count)


def _flags(config: GRPOLossConfig, parts: TokenParts, ratio: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens that the lower clip held, that the upper clip held, and that another bound or the selection did."""
    positive, negative = parts.advantage > 0, parts.advantage < 0
    low, high = config.ratio_bounds
    nowhere = torch.zeros_like(positive)
    if config.surrogate in DIVERGENCES:
        within = within_divergence(config, parts.log_prob, parts.old, parts.advantage)
        return negative & ~within, positive & ~within, within & (ratio > (config.ratio_cap or math.inf))
    clipped = parts.gap if config.surrogate == "gmpo" else ratio
    clip_low = nowhere if low is None else negative & (clipped < low)
    clip_high = nowhere if high is None else positive & (clipped > high)
    if parts.selected is not None:
        return clip_low, clip_high, parts.selected
    capped = nowhere if config.delta is None else ratio > config.delta
    if config.dual_clip is not None:
        capped = negative & (ratio > config.dual_clip)
    return clip_low, clip_high, capped


@torch.no_grad()
def _metrics(inputs: LossInputs, config: GRPOLossConfig, terms: _Terms, token_loss: Tensor) -> Tensor:
    """The 30 values in the order of `metrics.NAMES`."""
    rows, live, parts = terms.rows, terms.rows.live, terms.parts
    ratio = parts.log_ratio.exp()

    def total(value: Tensor | None) -> Tensor:
        return token_loss.new_zeros(()) if value is None else torch.where(live, value, 0).sum().to(token_loss.dtype)

    clip_low, clip_high, capped = (live & flag for flag in _flags(config, parts, ratio))
    length = rows.lengths(token_loss)
    filled = length > 0
    low_share, high_share = (
        rows.sum(clip.to(token_loss.dtype)) / length.clamp(min=1) for clip in (clip_low, clip_high)
    )
    weight, distance, scored = terms.sampler_weight, None, None
    if inputs.sampler_log_probs is not None:
        scored = ~gap(parts.old, inputs.sampler_log_probs).isnan()
        distance = torch.where(scored, evidence(parts.old, inputs.sampler_log_probs).abs(), 0)
    policy_gap = parts.gap
    if config.ratio_level == "token":
        policy_gap = bounded(policy_gap, config.log_ratio_min, config.log_ratio_max)
    values = [
        total(live),
        filled.sum(),
        token_loss.new_full((), token_loss.numel()),
        total(~token_loss.isfinite()),
        total(terms.policy),
        total(terms.kl),
        total(inputs.entropy),
        total(policy_gap),
        total(ratio),
        total(ratio * ratio),
        total(clip_low),
        total(clip_high),
        total(capped),
        low_share.sum(),
        high_share.sum(),
        total(weight),
        total(None if weight is None else weight * weight),
        total(distance),
        total(scored),
        total(terms.dropped),
        total(terms.entropy_live),
        total(parts.advantage == 0),
        total(parts.phi),
        _smallest(ratio, live),
        token_loss.new_full((), math.inf) if weight is None else _smallest(weight, live),
        _smallest(low_share, filled),
        -_smallest(-ratio, live),
        token_loss.new_full((), -math.inf) if weight is None else -_smallest(-weight, live),
        token_loss.new_full((), -math.inf)
        if distance is None or scored is None
        else -_smallest(-distance, live & scored),
        -_smallest(-high_share, filled),
    ]
    return torch.stack([value.to(torch.float32) for value in values])


def _smallest(value: Tensor, keep: Tensor) -> Tensor:
    """Minimum over the kept values that are not NaN, +inf without any."""
    value = torch.where(keep & ~value.isnan(), value, math.inf).flatten()
    return torch.cat([value, value.new_full((1,), math.inf)]).amin()
