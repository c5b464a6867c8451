"""The definition of the GRPO loss in plain differentiable PyTorch: the oracle in float64, and the fallback on any
device.

Nothing here depends on the data in Python's control flow, so torch.compile traces it. Gradients that must be zero are
cut where they enter (`_gate`), not multiplied by zero: an infinite ratio behind a clip would otherwise give 0 * inf =
NaN.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from grpo_kernels.grpo_loss.config import GRPOLossConfig

_LOG_WEIGHT_MIN = math.log(1e-8)
_LOG_WEIGHT_MAX = 20.0
_GAP_LIMIT = 1e4


class LossInputs(NamedTuple):
    """The arguments of the loss in the one form that every backend takes: floating tensors share a dtype, absent ones
    are None."""

    log_probs: Tensor  # [B, T], or [N] with cu_seqlens
    old_log_probs: Tensor | None  # as log_probs
    advantages: Tensor  # [B, 1], or as log_probs
    mask: Tensor | None  # as log_probs; bool or integer
    ref_log_probs: Tensor | None
    sampler_log_probs: Tensor | None
    token_weights: Tensor | None  # [B, 1], or as log_probs
    entropy: Tensor | None
    entropy_threshold: Tensor | None  # 0-d
    cu_seqlens: Tensor | None  # [B + 1]
    kl_coef: Tensor | float
    entropy_coef: Tensor | float
    num_items: Tensor | float  # 0.0: absent
    max_length: int  # 0: T


class Rows(NamedTuple):
    """Which tokens count, and which sequence each belongs to."""

    live: Tensor
    row_of: Tensor | None  # packed: the sequence of each token; those outside all sequences share one more row
    batch: int

    def sum(self, value: Tensor) -> Tensor:
        """[B, 1], or [B + 1] when packed: sum over the live tokens of each sequence."""
        value = torch.where(self.live, value, 0)
        if self.row_of is None:
            return value.sum(-1, keepdim=True)
        return value.new_zeros(self.batch + 1).index_add(0, self.row_of, value)

    def spread(self, value: Tensor) -> Tensor:
        """Gives every token the value of its sequence."""
        return value.expand(self.live.shape) if self.row_of is None else value[self.row_of]

    def to_tokens(self, value: Tensor) -> Tensor:
        """Per-token form of an argument that may be [B, 1]; zero where it does not count."""
        if self.row_of is not None and value.ndim == 2:
            value = torch.cat([value[:, 0], value.new_zeros(1)])[self.row_of]
        return torch.where(self.live, value, 0)


def rows_of(log_probs: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Rows:
    live = torch.ones_like(log_probs, dtype=torch.bool) if mask is None else mask != 0
    if cu_seqlens is None:
        return Rows(live, None, log_probs.shape[0])
    batch = cu_seqlens.shape[0] - 1
    positions = torch.arange(log_probs.shape[0], device=log_probs.device)
    index = torch.searchsorted(cu_seqlens.to(positions.dtype), positions, right=True) - 1
    inside = (index >= 0) & (index < batch)
    return Rows(live & inside, torch.where(inside, index, batch), batch)


def entropy_threshold(entropy: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, keep: float) -> Tensor:
    """0-d: the entropy that the share ``keep`` of the live tokens reaches, linearly interpolated; +inf without live
    tokens.

    The rank is formed in the entropy's own dtype, as `torch.quantile` does, whose limit of 16 million elements does
    not apply here.
    """
    entropy = entropy.detach()
    valid = rows_of(entropy, mask, cu_seqlens).live & ~entropy.isnan()
    ordered = torch.where(valid, entropy, math.inf).flatten()
    ordered = torch.cat([ordered, ordered.new_full((1,), math.inf)]).sort().values
    count = valid.sum()
    rank = (count - 1).clamp(min=0).to(entropy.dtype) * (1.0 - keep)
    neighbours = torch.stack([rank.floor(), rank.ceil()]).long()
    below, above = ordered.gather(0, neighbours).unbind()  # indexing with a 0-d tensor would read it on the host
    return torch.where(count > 0, torch.lerp(below, above, rank - rank.floor()), math.inf)


def _either(condition: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """One of two numbers in the dtype of `like`; torch.where would give them the default dtype."""
    return torch.full_like(like, no).masked_fill(condition, yes)


def _gate(value: Tensor, keep: Tensor) -> Tensor:
    """`value`, through which a gradient flows only where `keep`, or where it is NaN and should show."""
    return torch.where(keep | value.isnan(), value, value.detach())


def _gap(a: Tensor, b: Tensor) -> Tensor:
    """a - b; equal infinities have no gap."""
    return torch.where((a == b) & a.isinf(), 0, a - b)


def _evidence(a: Tensor, b: Tensor) -> Tensor:
    """a - b of stored log-probs, bounded; one that is missing (NaN) is no evidence of a gap."""
    return _gap(a, b).nan_to_num(nan=0.0).clamp(-_GAP_LIMIT, _GAP_LIMIT)


def _times(weight: Tensor, value: Tensor) -> Tensor:
    """weight * value, where zero wins over infinity."""
    zero = (weight == 0) & value.isinf() | weight.isinf() & (value == 0)
    return torch.where(zero, 0, weight.masked_fill(zero, 0) * value)


def _policy_term(
    config: GRPOLossConfig, log_prob: Tensor, log_ratio: Tensor, advantage: Tensor, weight: Tensor, phi: Tensor | None
) -> Tensor:
    """Per-token policy loss; `weight` is the advantage times all factors without a gradient."""
    ratio = log_ratio.detach().exp()
    if config.surrogate == "ppo_clip":
        return _ppo_clip(config, ratio, log_ratio, advantage, weight)
    if config.surrogate == "sapo":
        tau = _either(advantage > 0, config.sapo_temperature_pos, config.sapo_temperature_neg, ratio)
        moving = _gate(log_ratio, (weight != 0) & ~ratio.isinf()).exp()
        return -_times(weight, torch.sigmoid(tau * (moving - 1)) * (4 / tau))
    if config.surrogate == "cispo":
        low, high = config.ratio_bounds
        coefficient = _times(weight, ratio.clamp(low, high))
    elif config.surrogate == "vespo" and phi is not None:
        coefficient = _times(weight, phi)
    else:
        coefficient = weight
    return -_times(coefficient, log_prob)


def _ppo_clip(config: GRPOLossConfig, ratio: Tensor, log_ratio: Tensor, advantage: Tensor, weight: Tensor) -> Tensor:
    low, high = config.ratio_bounds
    unclipped = ratio if config.delta is None else ratio.clamp(max=config.delta)
    clipped = ratio.clamp(low, high)
    take_unclipped = unclipped * advantage <= clipped * advantage
    bound = torch.where(take_unclipped, unclipped, clipped)
    held = torch.where(take_unclipped, unclipped < ratio, (clipped < ratio) | (clipped > ratio))
    if config.dual_clip is not None:
        too_high = (advantage < 0) & (bound > config.dual_clip)
        bound = torch.where(too_high, config.dual_clip, bound)
        held = held | too_high
    moving = _gate(log_ratio, ~held & (weight != 0)).exp()
    return -_times(weight, torch.where(held, bound, moving))


def _kl_term(config: GRPOLossConfig, log_prob: Tensor, ref: Tensor, ratio: Tensor) -> Tensor:
    """Per-token estimate of the KL to the reference policy."""
    gap = _gap(ref, log_prob)
    limit = config.kl_log_ratio_clamp
    x = gap if limit is None else gap.clamp(-limit, limit)
    kind = config.kl_estimator.rstrip("+")
    if kind == "k1":
        kl = -x
    elif kind == "k2":
        kl = 0.5 * x * x
    elif kind == "k3":
        excess = torch.expm1(x)
        kl = torch.where(x == math.inf, excess, excess - x)
    else:
        kl = x.abs()
    if config.kl_value_clamp is not None:
        kl = kl.clamp(-config.kl_value_clamp, config.kl_value_clamp)
    if config.kl_estimator.endswith("+"):
        slope = torch.where(gap.isinf(), 0, -gap).detach()
        kl = kl.detach() + slope * torch.where(log_prob.isfinite(), log_prob - log_prob.detach(), 0)
    return kl * ratio if config.kl_importance_weighted else kl


def _vespo_weight(
    config: GRPOLossConfig, rows: Rows, log_ratio: Tensor, log_sampler_weight: Tensor | None, advantage: Tensor
) -> Tensor:
    """phi(w) = exp(lambda + k log w - lambda w) of the sequence's ratio w, one at w = 1."""
    log_w = rows.sum(log_ratio.clamp(-_LOG_WEIGHT_MAX, _LOG_WEIGHT_MAX))
    if log_sampler_weight is not None:
        log_w = log_w + rows.sum(log_sampler_weight.clamp(_LOG_WEIGHT_MIN, _LOG_WEIGHT_MAX))
    log_w = rows.spread(log_w.clamp(_LOG_WEIGHT_MIN, _LOG_WEIGHT_MAX))
    positive = advantage >= 0
    k = _either(positive, config.vespo_k_pos, config.vespo_k_neg, log_w)
    decay = _either(positive, config.vespo_lambda_pos, config.vespo_lambda_neg, log_w).clamp(min=1e-4)
    return (decay + k * log_w - decay * log_w.exp()).exp().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _sampler_weight(config: GRPOLossConfig, rows: Rows, old: Tensor, sampler: Tensor) -> tuple[Tensor, Tensor]:
    """The importance weight of the sampler's mismatch for every token, and its logarithm."""
    gap = _evidence(old, sampler)
    if config.sampler_correction.startswith("sequence"):
        gap = rows.spread(rows.sum(gap))
    weight = gap.exp()
    low, high = config.sampler_floor, config.sampler_cap
    if config.sampler_correction.endswith("truncate"):
        log_low = -math.inf if not low else math.log(low)
        log_high = math.inf if high is None else math.log(high)
        return weight.clamp(low, high), gap.clamp(log_low, log_high)
    if config.sampler_correction.endswith("mask"):
        keep = (weight >= (0.0 if low is None else low)) & (weight <= (math.inf if high is None else high))
        return torch.where(keep, weight, 0), torch.where(keep, gap, -math.inf)
    return weight, gap


class _Terms(NamedTuple):
    """Per-token quantities, all [B, T] or [N]."""

    rows: Rows
    policy: Tensor  # differentiable
    kl: Tensor | None  # differentiable
    entropy_live: Tensor  # the tokens that the entropy mask keeps
    advantage: Tensor
    old: Tensor
    log_ratio: Tensor  # per token, detached
    ratio: Tensor  # at ratio_level, detached
    sampler_weight: Tensor | None
    dropped: Tensor  # by the off-policy mask
    phi: Tensor | None


def _terms(inputs: LossInputs, config: GRPOLossConfig, kl_coef: Tensor) -> _Terms:
    rows = rows_of(inputs.log_probs, inputs.mask, inputs.cu_seqlens)
    live = rows.live
    lp = torch.where(live, inputs.log_probs, 0)
    old = lp.detach() if inputs.old_log_probs is None else torch.where(live, inputs.old_log_probs, 0)
    sampler = None if inputs.sampler_log_probs is None else torch.where(live, inputs.sampler_log_probs, 0)
    advantage = rows.to_tokens(inputs.advantages)
    length = rows.sum(torch.ones_like(lp)).clamp(min=1)

    token_log_ratio = _gap(lp, old)
    log_ratio = token_log_ratio
    if config.ratio_level == "sequence":
        log_ratio = rows.spread(rows.sum(token_log_ratio) / length)

    weight = torch.ones_like(lp) if inputs.token_weights is None else rows.to_tokens(inputs.token_weights)
    dropped = torch.zeros_like(live)
    if config.off_policy_threshold is not None:
        drift = rows.spread(rows.sum(_evidence(old if sampler is None else sampler, lp.detach())) / length)
        dropped = live & ~((advantage >= 0) | (drift <= config.off_policy_threshold))
        weight = torch.where(dropped, 0, weight)
    entropy_live = live
    if inputs.entropy is not None and inputs.entropy_threshold is not None:
        entropy_live = live & (inputs.entropy.detach() >= inputs.entropy_threshold)
        weight = torch.where(entropy_live, weight, 0)
    sampler_weight, log_sampler_weight = None, None
    if sampler is not None:
        sampler_weight, log_sampler_weight = _sampler_weight(config, rows, old, sampler)
        if config.sampler_correction == "none":
            log_sampler_weight = None
        elif config.surrogate != "vespo":
            weight = _times(weight, sampler_weight)
    weight = _times(advantage, weight)

    phi = None
    if config.surrogate == "vespo":
        phi = _vespo_weight(config, rows, token_log_ratio.detach(), log_sampler_weight, advantage)
    policy = _policy_term(config, lp, log_ratio, advantage, weight, phi)
    kl = None
    if inputs.ref_log_probs is not None:
        counted = (kl_coef != 0).expand(live.shape)  # nothing reaches the gradient through a term with coefficient 0
        ref = torch.where(live, inputs.ref_log_probs, 0)
        kl = _kl_term(config, _gate(lp, counted), ref, _gate(log_ratio, counted).exp())
    return _Terms(
        rows,
        policy,
        kl,
        entropy_live,
        advantage,
        old,
        token_log_ratio.detach(),
        log_ratio.detach().exp(),
        sampler_weight,
        dropped,
        phi,
    )


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
    if config.reduction == "none":
        return (token_loss if bonus is None else token_loss - bonus), values
    loss = _reduce(config, rows, token_loss, num_items, inputs.max_length or like.shape[-1])
    if bonus is not None:
        loss = loss - bonus.sum() / terms.entropy_live.sum().clamp(min=1)
    return loss, values


def _scalar(value: Tensor | float, like: Tensor) -> Tensor:
    return value.to(like.dtype) if isinstance(value, Tensor) else like.new_full((), value)


def _reduce(config: GRPOLossConfig, rows: Rows, token_loss: Tensor, num_items: Tensor, max_length: int) -> Tensor:
    tokens = rows.live.sum().clamp(min=1).to(token_loss.dtype)
    if config.reduction == "token_mean":
        return token_loss.sum() / torch.where(num_items > 0, num_items, tokens)
    per_sequence = rows.sum(token_loss)
    if config.reduction == "sequence_mean_token_mean":
        per_sequence = per_sequence / rows.sum(torch.ones_like(token_loss)).clamp(min=1)
    elif config.reduction == "sequence_mean_token_sum_norm":
        per_sequence = per_sequence / max(max_length, 1)
    return per_sequence.sum() / torch.where(num_items > 0, num_items, max(rows.batch, 1))


@torch.no_grad()
def _metrics(inputs: LossInputs, config: GRPOLossConfig, terms: _Terms, token_loss: Tensor) -> Tensor:
    """The 30 values in the order of `metrics.NAMES`."""
    rows, live, ratio, advantage = terms.rows, terms.rows.live, terms.ratio, terms.advantage

    def total(value: Tensor | None) -> Tensor:
        return token_loss.new_zeros(()) if value is None else torch.where(live, value, 0).sum().to(token_loss.dtype)

    low, high = config.ratio_bounds
    nowhere = torch.zeros_like(live)
    clip_low = nowhere if low is None else live & (ratio < low) & (advantage < 0)
    clip_high = nowhere if high is None else live & (ratio > high) & (advantage > 0)
    capped = nowhere if config.delta is None else ratio > config.delta
    if config.dual_clip is not None:
        capped = (advantage < 0) & (ratio > config.dual_clip)
    length = rows.sum(torch.ones_like(token_loss))
    filled = length > 0
    low_share, high_share = (
        rows.sum(clip.to(token_loss.dtype)) / length.clamp(min=1) for clip in (clip_low, clip_high)
    )
    weight, gap, scored = terms.sampler_weight, None, None
    if inputs.sampler_log_probs is not None:
        gap = _evidence(terms.old, inputs.sampler_log_probs).abs()
        scored = ~_gap(terms.old, inputs.sampler_log_probs).isnan()
        gap = torch.where(scored, gap, 0)
    values = [
        total(live),
        filled.sum(),
        token_loss.new_full((), token_loss.numel()),
        total(~token_loss.isfinite()),
        total(terms.policy),
        total(terms.kl),
        total(inputs.entropy),
        total(terms.log_ratio),
        total(ratio),
        total(ratio * ratio),
        total(clip_low),
        total(clip_high),
        total(capped),
        low_share.sum(),
        high_share.sum(),
        total(weight),
        total(None if weight is None else weight * weight),
        total(gap),
        total(scored),
        total(terms.dropped),
        total(terms.entropy_live),
        total(advantage == 0),
        total(terms.phi),
        _smallest(ratio, live),
        token_loss.new_full((), math.inf) if weight is None else _smallest(weight, live),
        _smallest(low_share, filled),
        -_smallest(-ratio, live),
        token_loss.new_full((), -math.inf) if weight is None else -_smallest(-weight, live),
        token_loss.new_full((), -math.inf) if gap is None or scored is None else -_smallest(-gap, live & scored),
        -_smallest(-high_share, filled),
    ]
    return torch.stack([value.to(torch.float32) for value in values])


def _smallest(value: Tensor, keep: Tensor) -> Tensor:
    """Minimum over the kept values that are not NaN, +inf without any."""
    value = torch.where(keep & ~value.isnan(), value, math.inf).flatten()
    return torch.cat([value, value.new_full((1,), math.inf)]).amin()
