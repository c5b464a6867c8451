"""Policy losses under verl's signature, computed by `grpo_loss`: ``grpo_kernels:<name>``."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from grpo_kernels.grpo_loss import GRPOLossConfig, grpo_loss
from grpo_kernels.grpo_loss.choices import CLIPPING
from grpo_kernels.grpo_loss.presets import preset_fields
from grpo_kernels.integrations.verl.metrics import verl_metrics

PolicyLoss = Callable[..., tuple[Tensor, dict[str, float]]]

VERL_MODES = (
    "vanilla", "dppo_tv", "dppo_kl", "gspo", "sapo", "gpg", "clip_cov", "kl_cov", "geo_mean", "dro", "cispo",
)  # fmt: skip
"""verl's own loss modes, each equal to verl's function."""
PRESETS = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "vespo", "gspo_token", "gmpo", "reinforce")
"""Presets of GRPOLossConfig beside them. The actor's config says clip range and reduction, the preset the rest."""

_SMALLEST_WEIGHT = 1e-10  # what verl adds to a weight before its logarithm
_SEQUENCE_MEAN = "seq-mean-token-mean"


@dataclasses.dataclass(frozen=True)
class ActorOptions:
    """What the losses read of verl's ActorConfig; hashable, so that a config is made once for each."""

    clip_ratio: float
    clip_ratio_low: float | None
    clip_ratio_high: float | None
    clip_ratio_c: float | None  # None: not in the config
    loss_agg_mode: str
    loss_scale_factor: int | None
    tau_pos: float
    tau_neg: float
    policy_loss: tuple[tuple[str, Any], ...]

    @classmethod
    def read(cls, config: Any, loss_agg_mode: str) -> ActorOptions:
        """From an ActorConfig, or a mapping of its fields. Global counts are not among them."""
        names = ("clip_cov_ratio", "clip_cov_lb", "clip_cov_ub", "kl_cov_ratio", "ppo_kl_coef", "dro_beta")
        policy_loss = config.get("policy_loss", None) or {}
        given = tuple((name, policy_loss.get(name)) for name in names if policy_loss.get(name) is not None)
        return cls(
            config.get("clip_ratio", 0.2),
            config.get("clip_ratio_low", None),
            config.get("clip_ratio_high", None),
            config.get("clip_ratio_c", None),
            loss_agg_mode,
            _global_batch(config).get("loss_scale_factor", None),
            config.get("tau_pos", 1.0),
            config.get("tau_neg", 1.05),
            given,
        )


@functools.lru_cache(maxsize=256)
def loss_config(name: str, actor: ActorOptions) -> GRPOLossConfig:
    """The loss of this name for these options of the actor.

    Raises:
        ValueError: the options are not those of a loss, as with `GRPOLossConfig.verl`.
    """
    mode = name if name in VERL_MODES else "vanilla"
    options = {
        "clip_ratio": actor.clip_ratio,
        "clip_ratio_low": actor.clip_ratio_low,
        "clip_ratio_high": actor.clip_ratio_high,
        "loss_agg_mode": actor.loss_agg_mode,
        "loss_scale_factor": actor.loss_scale_factor,
        "tau_pos": actor.tau_pos,
        "tau_neg": actor.tau_neg,
        **dict(actor.policy_loss),
    }
    options["clip_ratio_c"] = (20.0 if mode.startswith("dppo") else 3.0) if actor.clip_ratio_c is None else (
        actor.clip_ratio_c
    )  # fmt: skip
    config = GRPOLossConfig.verl(loss_mode=mode, **options)
    if name in VERL_MODES:
        return config
    reduction = {field: getattr(config, field) for field in ("reduction", "max_length", "skip_empty_sequences")}
    fields: dict[str, Any] = {**preset_fields(name), **reduction}
    if fields.get("surrogate", "ppo_clip") in CLIPPING:
        fields.update(clip_low=config.clip_low, clip_high=config.clip_high)
    return GRPOLossConfig(**fields)


def make_policy_loss(name: str) -> PolicyLoss:
    """A function with verl's signature of a policy loss.

    Raises:
        ValueError: there is no such loss.
    """
    if name not in (*VERL_MODES, *PRESETS):
        choices = ", ".join(map(repr, (*VERL_MODES, *PRESETS)))
        raise ValueError(f"verl policy loss: name must be one of {choices}, got {name!r}")

    def policy_loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        if config is None:
            raise ValueError(f"grpo_kernels:{name}: config must be verl's ActorConfig, got None")
        loss = loss_config(name, ActorOptions.read(config, loss_agg_mode))
        weights = rollout_is_weights
        if weights is not None and loss.surrogate == "gmpo":
            weights = _sequence_weights(weights, response_mask)
        num_items, factor = (None, 1.0) if name == "geo_mean" else _global_counts(name, loss, config)
        output = grpo_loss(
            log_prob, old_log_prob, advantages, response_mask, loss, token_weights=weights, num_items=num_items
        )
        metrics = verl_metrics(name, loss, output.metrics.values, log_prob, old_log_prob, advantages, response_mask)
        return (output.loss if factor == 1.0 else output.loss * factor), metrics

    policy_loss.__name__ = policy_loss.__qualname__ = f"policy_loss_{name}"
    policy_loss.__doc__ = f"`{name}` for verl's actor; see docs/verl.md."
    return policy_loss


POLICY_LOSSES: dict[str, PolicyLoss] = {name: make_policy_loss(name) for name in (*VERL_MODES, *PRESETS)}
"""What is registered, each as ``grpo_kernels:<name>``."""


def _global_batch(config: Any) -> Mapping[str, Any]:
    found: Mapping[str, Any] = config.get("global_batch_info", None) or {}
    return found


def _global_counts(name: str, loss: GRPOLossConfig, config: Any) -> tuple[float | Tensor | None, float]:
    """What the sum is divided by, None for the count in the call, and a factor of the loss.

    Ranks average their gradients, so each divides the sum over its tokens by the global count over `dp_size`.
    """
    info = _global_batch(config)
    ranks = info.get("dp_size", 1)
    if loss.reduction == "token_sum":
        return None, float(ranks)
    key = "batch_num_tokens" if loss.reduction == "token_mean" else "global_batch_size"
    count = info.get(key)
    if count is not None:
        return count / ranks, 1.0
    if ranks > 1:
        raise ValueError(
            f"grpo_kernels:{name}: config.global_batch_info must have {key} with dp_size = {ranks}, got None"
        )
    return None, 1.0


def _sequence_weights(weights: Tensor, mask: Tensor) -> Tensor:
    """[B, 1]: the geometric mean of a sequence's weights, which its geometric mean of ratios takes."""
    live = mask != 0
    logs = torch.where(live, weights + _SMALLEST_WEIGHT, 1.0).log()
    return (logs.sum(-1, keepdim=True) / live.sum(-1, keepdim=True).clamp(min=1)).exp()
