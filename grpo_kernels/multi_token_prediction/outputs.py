"""What the loss of multi-token prediction takes of a policy, and what it gives."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from grpo_kernels.grpo_loss import GRPOLossConfig, GRPOMetrics

_DEFAULT_CONFIG = GRPOLossConfig()


class PolicyTerms(NamedTuple):
    """What depth 0 needs to carry the GRPO loss: the arguments of `linear_grpo_loss` of these names.

    Packed, with as many sequences as tokens, one value for each is read as one for each sequence.

    Args:
        old_log_probs: [B, T] or [N], or None for on-policy.
        advantages: [B] or [B, T] ([B] or [N] packed).
        config: the variant.
        ref_log_probs: [B, T] or [N].
        sampler_log_probs: [B, T] or [N].
        token_weights: [B, T], [B, 1] or [B] ([N] packed).
        kl_coef: number or 0-d tensor; None: the config's.
        entropy_coef: number or 0-d tensor; None: the config's.
        num_items: number or 0-d tensor that the policy's loss is divided by; that of the call divides the other depths.
        max_length: of the reduction "sequence_mean_token_sum_norm".
    """

    old_log_probs: Tensor | None
    advantages: Tensor
    config: GRPOLossConfig = _DEFAULT_CONFIG
    ref_log_probs: Tensor | None = None
    sampler_log_probs: Tensor | None = None
    token_weights: Tensor | None = None
    kl_coef: Tensor | float | None = None
    entropy_coef: Tensor | float | None = None
    num_items: Tensor | float | None = None
    max_length: int | None = None


class MTPLossOutput(NamedTuple):
    """The loss of all depths, and what is known of each. Only `loss` is differentiable.

    Floats are float32, float64 for float64 inputs.

    Args:
        loss: 0-d float. Sum of depth_weights[k] * depth_losses[k].
        depth_losses: [D + 1] float, not weighted.
        valid_counts: [D + 1] int64. Rows that predict a token that counts.
        acceptance: [D + 1] float. Top-1 accuracy: share of these rows whose likeliest token is the data's. Depth 0's
            distribution has nothing to do with it, nor has the rate at which drafts are accepted. 0 where there are
            none.
        agreement: [D + 1] float. Share of these rows whose likeliest token is that of depth 0 for the same place, row i
            of depth k against row i + k of depth 0, all on the data's own tokens. Exactly what greedy verification
            accepts of first drafts (k = 1); for depth k an estimate, given that the drafts before it stand. 0 where
            there are none.
        log_probs: [N] or [B, T] float of depth 0, in nats, by row; 0 where it predicts nothing that counts.
        entropy: likewise, with a policy; else None.
        metrics: of the policy's loss; None without one.
    """

    loss: Tensor
    depth_losses: Tensor
    valid_counts: Tensor
    acceptance: Tensor
    agreement: Tensor
    log_probs: Tensor
    entropy: Tensor | None
    metrics: GRPOMetrics | None
