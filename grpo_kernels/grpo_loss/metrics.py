"""The statistics that the loss computes in passing, as one device tensor that is read only when somebody asks."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

SUMS = (
    "tokens",
    "sequences",
    "total_tokens",
    "nonfinite",
    "policy_loss",
    "kl",
    "entropy",
    "log_ratio",
    "ratio",
    "ratio_squared",
    "clip_low",
    "clip_high",
    "capped",
    "clip_low_rows",
    "clip_high_rows",
    "sampler_weight",
    "sampler_weight_squared",
    "sampler_gap",
    "sampler_scored",
    "off_policy_dropped",
    "high_entropy",
    "zero_advantage",
    "vespo_weight",
)
MINIMA = ("ratio_min", "sampler_weight_min", "clip_low_row_min")
MAXIMA = ("ratio_max", "sampler_weight_max", "sampler_gap_max", "clip_high_row_max")
NAMES = SUMS + MINIMA + MAXIMA
"""What each element of ``GRPOMetrics.values`` is."""

_FIRST_MINIMUM = len(SUMS)
_FIRST_MAXIMUM = len(SUMS) + len(MINIMA)


class GRPOMetrics(NamedTuple):
    """Statistics of one loss call over its live tokens.

    Args:
        values: ``[30] float32``. Sums, counts, minima and maxima in the order of ``metrics.NAMES``, on the device of
            the loss. It can be merged and reduced over ranks before any of it is read.
        passes: How often `linear_grpo_loss` formed the logits for a training step: 1 (gradients in the forward) or 2.
            0: the loss was computed from log-probs.
    """

    values: Tensor
    passes: int = 0

    def merge(self, other: GRPOMetrics) -> GRPOMetrics:
        """The statistics of both calls together, as for micro-batches of one step."""
        if not isinstance(other, GRPOMetrics):
            raise TypeError(f"GRPOMetrics.merge: other must be GRPOMetrics, got {type(other).__name__}")
        mine, theirs = self.values, other.values
        return GRPOMetrics(
            torch.cat(
                [
                    mine[:_FIRST_MINIMUM] + theirs[:_FIRST_MINIMUM],
                    torch.minimum(mine[_FIRST_MINIMUM:_FIRST_MAXIMUM], theirs[_FIRST_MINIMUM:_FIRST_MAXIMUM]),
                    torch.maximum(mine[_FIRST_MAXIMUM:], theirs[_FIRST_MAXIMUM:]),
                ]
            ),
            max(self.passes, other.passes),
        )

    def all_reduce(self, group: torch.distributed.ProcessGroup | None = None) -> GRPOMetrics:
        """The statistics of all ranks of ``group`` together. Two collectives; nothing is read on the host."""
        sums = self.values[:_FIRST_MINIMUM].clone()
        # A maximum is the negative of the minimum of negatives, so that one collective serves both.
        extremes = torch.cat([self.values[_FIRST_MINIMUM:_FIRST_MAXIMUM], -self.values[_FIRST_MAXIMUM:]])
        torch.distributed.all_reduce(sums, torch.distributed.ReduceOp.SUM, group=group)
        torch.distributed.all_reduce(extremes, torch.distributed.ReduceOp.MIN, group=group)
        return GRPOMetrics(torch.cat([sums, extremes[: len(MINIMA)], -extremes[len(MINIMA) :]]), self.passes)

    def to_dict(self) -> dict[str, float]:
        """Means, shares and extremes by name. This reads the device: call it when you log, not in every micro-batch.

        A quantity without samples (no live token, no sampler log-probs, ...) is 0.

        - ``tokens``, ``sequences``: live tokens, sequences that have any. ``masked_fraction``: share of tokens that
          are masked. ``nonfinite_tokens``: live tokens whose loss is inf or NaN.
        - ``policy_loss``, ``kl``, ``entropy``: means over live tokens; the KL as it enters the loss (importance
          weighted if so configured), without its coefficient.
        - ``ratio_mean``, ``ratio_min``, ``ratio_max``: of the ratio to the old policy before any clip, but within
          ``log_ratio_min`` and ``log_ratio_max``. ``policy_kl``: mean of old_log_prob - log_prob, within them where the
          ratio is a token's. ``effective_sample_size``: (sum r)^2 / (tokens * sum r^2), 1 on-policy.
        - ``clip_low_fraction`` (r below its bound and A < 0), ``clip_high_fraction`` (r above its bound and A > 0),
          ``clip_fraction`` (either): shares of live tokens. ``clip_low_fraction_by_sequence``,
          ``clip_high_fraction_by_sequence``: means over sequences; ``clip_low_min``, ``clip_high_max``: the extreme
          sequences. "gmpo" counts the clipped log-ratios, "dppo_tv" and "dppo_kl" the tokens beyond the divergence.
          ``capped_fraction``: ``delta``, ``dual_clip`` or DPPO's ``ratio_cap`` held the ratio; with "clip_cov" and
          "kl_cov" the tokens that were selected.
        - ``sampler_weight_mean``, ``_min``, ``_max``: weights exp(old - sampler) after truncation or masking.
          ``sampler_effective_sample_size``: theirs. ``sampler_gap_mean``, ``_max``: |old - sampler| over the tokens
          that have both.
        - ``zero_advantage_fraction``, ``off_policy_dropped_fraction``, ``high_entropy_fraction``: shares of live
          tokens. ``vespo_weight_mean``: mean phi.
        - ``head_passes``: ``passes``, where it is not 0.
        """
        v = dict(zip(NAMES, self.values.tolist(), strict=True))
        tokens, sequences, scored = v["tokens"], v["sequences"], v["sampler_scored"]
        clip_low, clip_high = _quotient(v["clip_low"], tokens), _quotient(v["clip_high"], tokens)
        extremes = {name: 0.0 if v[name] == math.inf else v[name] for name in MINIMA}  # infinite: no sample
        extremes |= {name: 0.0 if v[name] == -math.inf else v[name] for name in MAXIMA}
        head = {"head_passes": float(self.passes)} if self.passes else {}
        return {
            **head,
            "tokens": tokens,
            "sequences": sequences,
            "masked_fraction": _quotient(v["total_tokens"] - tokens, v["total_tokens"]),
            "nonfinite_tokens": v["nonfinite"],
            "policy_loss": _quotient(v["policy_loss"], tokens),
            "kl": _quotient(v["kl"], tokens),
            "entropy": _quotient(v["entropy"], tokens),
            "policy_kl": _quotient(-v["log_ratio"], tokens),
            "ratio_mean": _quotient(v["ratio"], tokens),
            "ratio_min": extremes["ratio_min"],
            "ratio_max": extremes["ratio_max"],
            "effective_sample_size": _quotient(v["ratio"] ** 2, tokens * v["ratio_squared"]),
            "clip_low_fraction": clip_low,
            "clip_high_fraction": clip_high,
            "clip_fraction": clip_low + clip_high,
            "clip_low_fraction_by_sequence": _quotient(v["clip_low_rows"], sequences),
            "clip_high_fraction_by_sequence": _quotient(v["clip_high_rows"], sequences),
            "clip_low_min": extremes["clip_low_row_min"],
            "clip_high_max": extremes["clip_high_row_max"],
            "capped_fraction": _quotient(v["capped"], tokens),
            "sampler_weight_mean": _quotient(v["sampler_weight"], tokens),
            "sampler_weight_min": extremes["sampler_weight_min"],
            "sampler_weight_max": extremes["sampler_weight_max"],
            "sampler_effective_sample_size": _quotient(v["sampler_weight"] ** 2, tokens * v["sampler_weight_squared"]),
            "sampler_gap_mean": _quotient(v["sampler_gap"], scored),
            "sampler_gap_max": extremes["sampler_gap_max"],
            "zero_advantage_fraction": _quotient(v["zero_advantage"], tokens),
            "off_policy_dropped_fraction": _quotient(v["off_policy_dropped"], tokens),
            "high_entropy_fraction": _quotient(v["high_entropy"], tokens),
            "vespo_weight_mean": _quotient(v["vespo_weight"], tokens),
        }


def _quotient(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 0.0
