"""What the loss needs to know of all live tokens before it can treat one: the entropy that counts as high, and the
tokens that "clip_cov" and "kl_cov" choose. On the device, without reading it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grpo_kernels.grpo_loss.rows import LossInputs, rows_of
from grpo_kernels.grpo_loss.terms import finite_bounds, gap, log_ratios

if TYPE_CHECKING:
    from grpo_kernels.grpo_loss.config import GRPOLossConfig


def with_batch_statistics(inputs: LossInputs, config: GRPOLossConfig) -> LossInputs:
    """Adds the entropy threshold and the selection, where the config has them."""
    if inputs.entropy is not None and config.top_entropy_quantile < 1.0:
        keep = config.top_entropy_quantile
        threshold = entropy_threshold(inputs.entropy, inputs.mask, inputs.cu_seqlens, keep)
        inputs = inputs._replace(entropy_threshold=threshold)
    if config.selects_tokens:
        inputs = inputs._replace(selection=selected_tokens(inputs, config))
    return inputs


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


@torch.no_grad()
def selected_tokens(inputs: LossInputs, config: GRPOLossConfig) -> Tensor:
    """1 for the tokens that "clip_cov" drops or "kl_cov" penalises, else 0; shape and dtype of the log-probs.

    floor(share * live tokens), at least one, of the candidates: of highest covariance, the first of equals
    ("kl_cov"), or drawn uniformly with the default generator of the device ("clip_cov"). Means and covariances are
    float64, over the live tokens with a finite log-prob and advantage; others are no candidates.
    """
    log_prob = inputs.log_probs
    rows = rows_of(log_prob, inputs.mask, inputs.cu_seqlens)
    advantage = rows.to_tokens(inputs.advantages)
    scored = rows.live & log_prob.isfinite() & advantage.isfinite()
    covariance = _centred(advantage, scored) * _centred(log_prob, scored)
    if config.surrogate == "clip_cov":
        between = (covariance > config.clip_cov_low) & (covariance < config.clip_cov_high)
        candidates = scored & between & ~_clipped(inputs, config, advantage)
        key, share = torch.rand(log_prob.shape, dtype=torch.float64, device=log_prob.device), config.clip_cov_ratio
    else:
        candidates, key, share = scored, covariance, config.kl_cov_ratio
    wanted = (rows.live.sum().double() * share).floor().clamp(min=1)
    ranked = torch.where(candidates, key, -math.inf).flatten().sort(descending=True, stable=True).indices
    places = torch.arange(ranked.shape[0], device=ranked.device)
    first = torch.zeros_like(places).scatter(0, ranked, (places < wanted).to(places.dtype))
    return (candidates & (first.view(log_prob.shape) != 0)).to(log_prob.dtype)


def _centred(value: Tensor, scored: Tensor) -> Tensor:
    """value - its mean over the scored tokens, float64."""
    value = torch.where(scored, value, 0).double()
    return value - value.sum() / scored.sum().clamp(min=1)


def _clipped(inputs: LossInputs, config: GRPOLossConfig, advantage: Tensor) -> Tensor:
    """Whether the clip takes the token's gradient."""
    rows = rows_of(inputs.log_probs, inputs.mask, inputs.cu_seqlens)
    log_prob = torch.where(rows.live, inputs.log_probs, 0)
    old = log_prob if inputs.old_log_probs is None else torch.where(rows.live, inputs.old_log_probs, 0)
    ratio = log_ratios(config, rows, log_prob, gap(log_prob, old), advantage).exp()
    low, high = finite_bounds(config)
    return ((advantage < 0) & (ratio < low)) | ((advantage > 0) & (ratio > high))
