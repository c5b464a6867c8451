"""What a chunk of tokens needs of the loss before any log-prob is known: [N]-sized work, on the device."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_kernels.grpo_loss import GRPOLossConfig
from grpo_kernels.grpo_loss import ops as loss_ops
from grpo_kernels.grpo_loss.choices import RATIO_LEVELS, SAMPLER_CORRECTIONS, SURROGATES
from grpo_kernels.grpo_loss.rows import LossInputs, Rows

_SURROGATE, _RATIO_LEVEL, _REDUCTION, _CORRECTION = 0, 1, 2, 6  # places in the packed options


class TokenTerms(NamedTuple):
    """Arguments of the op linear_grpo_loss; tensors are [N] but for 0-d numbers."""

    old_log_probs: Tensor | None
    advantages: Tensor
    ref_log_probs: Tensor | None
    sampler_log_probs: Tensor | None
    token_weights: Tensor | None
    factors: Tensor
    entropy_factor: Tensor | None
    kl_coef_tensor: Tensor | None
    kl_coef: float
    sequence_length: int
    options: list[int]
    parameters: list[float]

    def times(self, weight: Tensor) -> TokenTerms:
        """Those of the loss times a 0-d weight."""
        bonus = self.entropy_factor
        return self._replace(factors=self.factors * weight, entropy_factor=None if bonus is None else bonus * weight)


def passes(config: GRPOLossConfig, *, length: int, longest: int, packed: bool, on_policy: bool) -> int:
    """1 where the derivative of the loss by a token's log-prob is known with that of its sequence, else 2.

    Args:
        length: tokens of a sequence, padded.
        longest: tokens that a chunk may hold.
        packed: where sequences begin is known on the device alone.
        on_policy: there are no old log-probs.
    """
    if config.reduction == "none" or config.top_entropy_quantile < 1.0 or config.selects_tokens:
        return 2
    if couples_tokens(config, on_policy):
        return 2 if packed or length > longest else 1
    return 1


def couples_tokens(config: GRPOLossConfig, on_policy: bool) -> bool:
    """Whether a token's derivative depends on the log-probs of its whole sequence."""
    return (
        config.ratio_level != "token"
        or config.surrogate in ("vespo", "gmpo")
        or config.off_policy_threshold is not None
        or (config.sampler_correction.startswith("sequence") and on_policy)
    )


def token_terms(config: GRPOLossConfig, inputs: LossInputs, rows: Rows) -> TokenTerms:
    """`inputs` of `grpo_loss`, without log-probs and entropy, for chunks of tokens or of whole sequences."""
    options, parameters = list(config.pack()[0]), list(config.pack()[1])
    options[_REDUCTION] = loss_ops.NO_REDUCTION
    coupled = couples_tokens(config, inputs.old_log_probs is None)
    sampler, weights = inputs.sampler_log_probs, inputs.token_weights
    if config.sampler_correction.startswith("sequence") and not coupled:
        weights = _sequence_correction(inputs, options, parameters)
        options[_CORRECTION] = SAMPLER_CORRECTIONS.index("none")
    if options[_CORRECTION] == SAMPLER_CORRECTIONS.index("none") and config.off_policy_threshold is None:
        sampler = None
    factors = _factors(config, inputs, rows).reshape(-1)
    kl_coef = inputs.kl_coef
    with_kl = isinstance(kl_coef, Tensor) or kl_coef != 0.0
    return TokenTerms(
        _flat(inputs.old_log_probs),
        rows.to_tokens(inputs.advantages).reshape(-1),
        _flat(inputs.ref_log_probs if with_kl else None),
        _flat(sampler),
        None if weights is None else rows.to_tokens(weights).reshape(-1),
        factors,
        _entropy_factor(config, inputs, rows, factors),
        kl_coef if isinstance(kl_coef, Tensor) else None,
        0.0 if isinstance(kl_coef, Tensor) else kl_coef,
        rows.live.shape[-1] if coupled else 0,
        options,
        parameters,
    )


def _flat(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.reshape(-1)


def _sequence_correction(inputs: LossInputs, options: list[int], parameters: list[float]) -> Tensor:
    """Token weights times the sampler's correction, which old log-probs alone determine.

    The loss kernel gives it, as the negative derivative of a loss -weight * log_prob.
    """
    old, mask = inputs.old_log_probs, inputs.mask
    if old is None:
        raise ValueError("a correction of sequences needs old_log_probs")
    options = list(options)
    options[_SURROGATE] = SURROGATES.index("reinforce")
    options[_RATIO_LEVEL] = RATIO_LEVELS.index("token")
    ones = torch.ones_like(old)
    arguments: tuple[Any, ...] = (
        old, old, ones, mask, None, inputs.sampler_log_probs, inputs.token_weights, None, None, None,
        inputs.cu_seqlens, ones, None, 0.0, None, 0.0, None, 0.0, 0, options, parameters, True, False, "native",
    )  # fmt: skip
    negative: Tensor = loss_ops.grpo_loss(*arguments)[1]
    return -negative


def _factors(config: GRPOLossConfig, inputs: LossInputs, rows: Rows) -> Tensor:
    """The weight of each token's loss in the loss, as `reference.grpo_loss` reduces it."""
    ones = torch.ones_like(inputs.log_probs, memory_format=torch.contiguous_format)
    given = inputs.num_items
    num_items = given.to(ones.dtype) if isinstance(given, Tensor) else ones.new_full((), given)
    if config.reduction == "token_sum":
        return torch.where(rows.live, ones, 0)
    if config.reduction == "token_mean":
        divisor = torch.where(num_items > 0, num_items, rows.live.sum().clamp(min=1))
        return torch.where(rows.live, ones / divisor, 0)
    count: Tensor | int = max(rows.batch, 1)
    if config.skip_empty_sequences:
        count = (rows.lengths(ones) > 0).sum().clamp(min=1)
    divisor = torch.where(num_items > 0, num_items, count)
    if config.reduction == "sequence_mean_token_mean":
        divisor = divisor * rows.spread(rows.lengths(ones).clamp(min=1))
    elif config.reduction == "sequence_mean_token_sum_norm":
        divisor = divisor * max(inputs.max_length or ones.shape[-1], 1)
    return torch.where(rows.live, ones / divisor, 0)


def _entropy_factor(config: GRPOLossConfig, inputs: LossInputs, rows: Rows, factors: Tensor) -> Tensor | None:
    """The weight of each token's entropy in the loss, 0-d or [N]."""
    coef = inputs.entropy_coef
    if not isinstance(coef, Tensor) and coef == 0.0:
        return None
    if config.entropy_reduction == "loss":
        return -coef * factors
    return -coef / rows.live.sum().clamp(min=1).to(inputs.log_probs.dtype)
