"""The parts of a token's loss in plain differentiable PyTorch: ratio, policy term, KL and weights.

Gradients that must be zero are cut where they enter (`gate`), not multiplied by zero: an infinite ratio behind a clip
would otherwise give 0 * inf = NaN.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from grpo_kernels.grpo_loss.choices import DIVERGENCES
from grpo_kernels.grpo_loss.rows import Rows

if TYPE_CHECKING:
    from grpo_kernels.grpo_loss.config import GRPOLossConfig

_LOG_WEIGHT_MIN = math.log(1e-8)
_LOG_WEIGHT_MAX = 20.0
_GAP_LIMIT = 1e4
_SMALLEST_PROBABILITY = 1e-8  # added to the probabilities of another token in "dppo_kl"


def either(condition: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """One of two numbers in the dtype of `like`; torch.where would give them the default dtype."""
    return torch.full_like(like, no).masked_fill(condition, yes)


def gate(value: Tensor, keep: Tensor) -> Tensor:
    """`value`, through which a gradient flows only where `keep`, or where it is NaN and should show."""
    return torch.where(keep | value.isnan(), value, value.detach())


def bounded(value: Tensor, low: float | None, high: float | None) -> Tensor:
    """`value` clamped, through which a gradient flows within the bounds and at NaN, where torch.clamp has none."""
    if low is None and high is None:
        return value
    return torch.where(value.isnan(), value, value.clamp(low, high))


def gap(a: Tensor, b: Tensor) -> Tensor:
    """a - b; equal infinities have no gap."""
    return torch.where((a == b) & a.isinf(), 0, a - b)


def evidence(a: Tensor, b: Tensor) -> Tensor:
    """a - b of stored log-probs, bounded; one that is missing (NaN) is no evidence of a gap."""
    return gap(a, b).nan_to_num(nan=0.0).clamp(-_GAP_LIMIT, _GAP_LIMIT)


def times(weight: Tensor, value: Tensor) -> Tensor:
    """weight * value, where zero wins over infinity."""
    zero = (weight == 0) & value.isinf() | weight.isinf() & (value == 0)
    return torch.where(zero, 0, weight.masked_fill(zero, 0) * value)


class TokenParts(NamedTuple):
    """What the policy term of a token is made of."""

    log_prob: Tensor  # differentiable
    old: Tensor
    gap: Tensor  # log_prob - old, differentiable
    log_ratio: Tensor  # of the ratio, differentiable
    advantage: Tensor
    factor: Tensor  # the product of all factors without a gradient
    weight: Tensor  # that times the advantage
    phi: Tensor | None
    selected: Tensor | None  # bool


def log_ratios(config: GRPOLossConfig, rows: Rows, log_prob: Tensor, token_gap: Tensor, advantage: Tensor) -> Tensor:
    """The log-ratio that the ratio of each token is exp of."""
    length = rows.lengths(token_gap).clamp(min=1)
    if config.surrogate == "gmpo":
        return rows.spread(rows.sum(_clipped_gap(config, token_gap, advantage)) / length)
    log_ratio = token_gap
    if config.ratio_level != "token":
        log_ratio = rows.spread(rows.sum(token_gap) / length)
    if config.ratio_level == "sequence_token":
        log_ratio = log_ratio.detach() + gap(log_prob, log_prob.detach())
    return bounded(log_ratio, config.log_ratio_min, config.log_ratio_max)


def finite_bounds(config: GRPOLossConfig) -> tuple[float, float]:
    """The bounds of a surrogate that has both."""
    low, high = config.ratio_bounds
    if low is None or high is None:
        raise ValueError(f"grpo_loss: surrogate={config.surrogate!r} has no bounds")
    return low, high


def _clipped_gap(config: GRPOLossConfig, token_gap: Tensor, advantage: Tensor) -> Tensor:
    """ "gmpo": the log-ratio, held at the bound that it has left in the advantage's direction; 0 without advantage."""
    low, high = finite_bounds(config)
    too_low, too_high = (advantage < 0) & (token_gap < low), (advantage > 0) & (token_gap > high)
    idle = (advantage == 0) & ~token_gap.isnan()
    held = torch.zeros_like(token_gap).masked_fill(too_low, low).masked_fill(too_high, high)
    return torch.where(too_low | too_high | idle, held, token_gap)


def within_divergence(config: GRPOLossConfig, log_prob: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
    """ "dppo_tv", "dppo_kl": whether the token's probability has not moved too far in the advantage's direction."""
    low, high = finite_bounds(config)
    prob, old_prob = log_prob.exp(), old.exp()
    if config.surrogate == "dppo_tv":
        return torch.where(advantage > 0, prob - old_prob <= high, prob - old_prob >= low)
    other, old_other = ((1 - p).clamp(min=0) for p in (prob, old_prob))
    log_others = torch.log((old_other + _SMALLEST_PROBABILITY) / (other + _SMALLEST_PROBABILITY))
    kl = times(old_prob, gap(old, log_prob)) + old_other * log_others
    return torch.where(advantage > 0, (kl <= high) | (prob <= old_prob), (kl <= -low) | (prob >= old_prob))


def policy_term(config: GRPOLossConfig, parts: TokenParts) -> Tensor:
    """Per-token policy loss."""
    log_ratio, advantage, weight, log_prob = parts.log_ratio, parts.advantage, parts.weight, parts.log_prob
    ratio = log_ratio.detach().exp()
    if config.surrogate in ("ppo_clip", "clip_cov"):
        return -times(weight, _ppo_clip(config, ratio, log_ratio, advantage, weight))
    if config.surrogate in ("gmpo", "kl_cov"):
        loss = -times(weight, gate(log_ratio, weight != 0).exp())
        if parts.selected is None:
            return loss
        factor = torch.where(parts.selected, parts.factor, 0)
        return loss + config.kl_cov_coef * times(factor, gate(parts.gap, factor != 0).abs())
    if config.surrogate == "sapo":
        tau = either(advantage > 0, config.sapo_temperature_pos, config.sapo_temperature_neg, ratio)
        moving = gate(log_ratio, (weight != 0) & ~ratio.isinf()).exp()
        return -times(weight, torch.sigmoid(tau * (moving - 1)) * (4 / tau))
    if config.surrogate == "dro":
        squared = 0.5 * config.dro_beta * gate(parts.gap, parts.factor != 0).square()
        return times(parts.factor, squared) - times(weight, log_prob)
    return -times(_score_weight(config, parts, ratio), log_prob)


def _score_weight(config: GRPOLossConfig, parts: TokenParts, ratio: Tensor) -> Tensor:
    """What a policy gradient with a detached coefficient multiplies the log-prob by."""
    if config.surrogate == "cispo":
        low, high = config.ratio_bounds
        return times(parts.weight, ratio.clamp(low, high))
    if config.surrogate in DIVERGENCES:
        within = within_divergence(config, parts.log_prob.detach(), parts.old, parts.advantage)
        capped = ratio if config.ratio_cap is None else ratio.clamp(max=config.ratio_cap)
        return times(parts.weight, torch.where(within | ratio.isnan(), capped, 0))
    return parts.weight if parts.phi is None else times(parts.weight, parts.phi)


def _ppo_clip(config: GRPOLossConfig, ratio: Tensor, log_ratio: Tensor, advantage: Tensor, weight: Tensor) -> Tensor:
    """What multiplies the weight."""
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
    moving = gate(log_ratio, ~held & (weight != 0)).exp()
    return torch.where(held, bound, moving)


def kl_term(config: GRPOLossConfig, log_prob: Tensor, ref: Tensor, ratio: Tensor) -> Tensor:
    """Per-token estimate of the KL to the reference policy."""
    distance = gap(ref, log_prob)
    limit = config.kl_log_ratio_clamp
    x = distance if limit is None else bounded(distance, -limit, limit)
    kind = config.kl_estimator.rstrip("+")
    if kind == "k1":
        kl = -x
    elif kind == "k2":
        kl = 0.5 * x * x
    elif kind == "k3":
        excess = torch.expm1(x)
        kl = torch.where(x == math.inf, excess, excess - x)
    else:
        kl = x * torch.where(x.isnan(), x, x.sign()).detach()  # the gradient of torch.abs at NaN is 0
    if config.kl_value_clamp is not None:
        kl = bounded(kl, -config.kl_value_clamp, config.kl_value_clamp)
    if config.kl_estimator.endswith("+"):
        slope = torch.where(distance.isinf(), 0, -distance).detach()
        kl = kl.detach() + slope * torch.where(log_prob.isfinite(), log_prob - log_prob.detach(), 0)
    return kl * ratio if config.kl_importance_weighted else kl


def vespo_weight(
    config: GRPOLossConfig, rows: Rows, log_ratio: Tensor, log_sampler_weight: Tensor | None, advantage: Tensor
) -> Tensor:
    """phi(w) = exp(lambda + k log w - lambda w) of the sequence's ratio w, one at w = 1."""
    log_w = rows.sum(log_ratio.clamp(-_LOG_WEIGHT_MAX, _LOG_WEIGHT_MAX))
    if log_sampler_weight is not None:
        log_w = log_w + rows.sum(log_sampler_weight.clamp(_LOG_WEIGHT_MIN, _LOG_WEIGHT_MAX))
    log_w = rows.spread(log_w.clamp(_LOG_WEIGHT_MIN, _LOG_WEIGHT_MAX))
    positive = advantage >= 0
    k = either(positive, config.vespo_k_pos, config.vespo_k_neg, log_w)
    decay = either(positive, config.vespo_lambda_pos, config.vespo_lambda_neg, log_w).clamp(min=1e-4)
    return (decay + k * log_w - decay * log_w.exp()).exp().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def sampler_weight(config: GRPOLossConfig, rows: Rows, old: Tensor, sampler: Tensor) -> tuple[Tensor, Tensor]:
    """The importance weight of the sampler's mismatch for every token, and its logarithm."""
    gap = evidence(old, sampler)
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
