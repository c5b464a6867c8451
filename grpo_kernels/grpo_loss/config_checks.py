"""What `GRPOLossConfig` refuses: wrong types and ranges, contradictions, fields that nothing uses."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from grpo_kernels.grpo_loss.choices import (
    CLIPPING,
    DIVERGENCES,
    ENTROPY_REDUCTIONS,
    KL_ESTIMATORS,
    RATIO_LEVELS,
    REDUCTIONS,
    SAMPLER_CORRECTIONS,
    SURROGATES,
    WITHOUT_RATIO,
)

if TYPE_CHECKING:
    from grpo_kernels.grpo_loss.config import GRPOLossConfig

_PREFIXED = ("sapo", "vespo", "dro", "clip_cov", "kl_cov")  # surrogates whose own fields begin with their name


def check_config(config: GRPOLossConfig) -> None:
    """Raises TypeError or ValueError."""
    _check_choices(config)
    _check_numbers(config)
    _check_combinations(config)
    _check_unused(config)


def _check_choices(config: GRPOLossConfig) -> None:
    estimators = (*KL_ESTIMATORS, *(f"{name}+" for name in KL_ESTIMATORS))
    for name, choices in (
        ("surrogate", SURROGATES),
        ("ratio_level", RATIO_LEVELS),
        ("reduction", REDUCTIONS),
        ("kl_estimator", estimators),
        ("sampler_correction", SAMPLER_CORRECTIONS),
        ("entropy_reduction", ENTROPY_REDUCTIONS),
    ):
        value = getattr(config, name)
        if not isinstance(value, str):
            raise TypeError(f"GRPOLossConfig: {name} must be a string, got {type(value).__name__}")
        if value not in choices:
            raise ValueError(f"GRPOLossConfig: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    for name in ("kl_importance_weighted", "skip_empty_sequences"):
        value = getattr(config, name)
        if not isinstance(value, bool):
            raise TypeError(f"GRPOLossConfig: {name} must be a bool, got {type(value).__name__}")


def _check_numbers(config: GRPOLossConfig) -> None:
    _check_number(config, "clip_low", 0.0)
    _check_number(config, "clip_high", 0.0, optional=True)
    for name in ("ratio_cap", "delta", "kl_log_ratio_clamp", "kl_value_clamp", "sampler_cap"):
        _check_number(config, name, 0.0, optional=True, exclusive=True)
    _check_number(config, "dual_clip", 1.0, optional=True, exclusive=True)
    _check_number(config, "sampler_floor", 0.0, optional=True)
    for name in ("sapo_temperature_pos", "sapo_temperature_neg", "dro_beta"):
        _check_number(config, name, 0.0, exclusive=True)
    for name in ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"):
        _check_number(config, name, 0.0)
    for name in ("kl_coef", "entropy_coef", "kl_cov_coef", "clip_cov_low", "clip_cov_high"):
        _check_number(config, name, -math.inf)
    for name in ("off_policy_threshold", "log_ratio_min", "log_ratio_max"):
        _check_number(config, name, -math.inf, optional=True)
    _check_number(config, "top_entropy_quantile", 0.0)
    if config.top_entropy_quantile > 1.0:
        raise ValueError(f"GRPOLossConfig: top_entropy_quantile must be in [0, 1], got {config.top_entropy_quantile}")
    for name in ("clip_cov_ratio", "kl_cov_ratio"):
        _check_number(config, name, 0.0, exclusive=True)
        if getattr(config, name) > 1.0:
            raise ValueError(f"GRPOLossConfig: {name} must be in (0, 1], got {getattr(config, name)}")
    if config.max_length is not None:
        if isinstance(config.max_length, bool) or not isinstance(config.max_length, int):
            raise TypeError(f"GRPOLossConfig: max_length must be an int, got {type(config.max_length).__name__}")
        if config.max_length < 1:
            raise ValueError(f"GRPOLossConfig: max_length must be at least 1, got {config.max_length}")


def _check_number(
    config: GRPOLossConfig, name: str, low: float, *, optional: bool = False, exclusive: bool = False
) -> None:
    value = getattr(config, name)
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        wanted = "a number or None" if optional else "a number"
        raise TypeError(f"GRPOLossConfig: {name} must be {wanted}, got {type(value).__name__}")
    if not math.isfinite(value) or value < low or (exclusive and value == low):
        bound = "" if low == -math.inf else f" {'greater than' if exclusive else 'at least'} {low:g}"
        raise ValueError(f"GRPOLossConfig: {name} must be a finite number{bound}, got {value}")


def _check_combinations(config: GRPOLossConfig) -> None:
    if config.delta is not None and config.dual_clip is not None:
        raise ValueError("GRPOLossConfig: delta and dual_clip both bound the unclipped branch; set one of them")
    if config.sampler_correction.endswith("truncate") and config.sampler_cap is None and config.sampler_floor is None:
        raise ValueError(
            f"GRPOLossConfig: sampler_correction={config.sampler_correction!r} needs sampler_cap or sampler_floor"
        )
    for low, high in (
        ("sampler_floor", "sampler_cap"),
        ("log_ratio_min", "log_ratio_max"),
        ("clip_cov_low", "clip_cov_high"),
    ):
        least, most = getattr(config, low), getattr(config, high)
        if least is not None and most is not None and least >= most:
            raise ValueError(f"GRPOLossConfig: {low} must be less than {high}, got {least} and {most}")
    if config.surrogate == "vespo" and config.sampler_correction.startswith("sequence"):
        raise ValueError(
            "GRPOLossConfig: sampler_correction must be 'none', 'token_truncate' or 'token_mask' with "
            f"surrogate='vespo', which folds the weight of each token into phi, got {config.sampler_correction!r}"
        )


def _check_unused(config: GRPOLossConfig) -> None:
    surrogate = f"surrogate={config.surrogate!r}"
    unused: dict[str, str] = {}
    if config.surrogate != "ppo_clip":
        unused.update(delta=surrogate, dual_clip=surrogate)
    if config.surrogate not in ("cispo", *DIVERGENCES):
        unused.update(ratio_cap=surrogate)
    if config.surrogate not in CLIPPING:
        unused.update(clip_low=surrogate, clip_high=surrogate)
    elif config.ratio_cap is not None and config.surrogate == "cispo":
        unused.update(clip_low="an absolute ratio_cap", clip_high="an absolute ratio_cap")
    fields = _defaults(config)
    for prefix in _PREFIXED:
        if config.surrogate != prefix:
            unused.update({name: surrogate for name in fields if name.startswith(prefix)})
    ratio = ("ratio_level", "log_ratio_min", "log_ratio_max")
    if config.surrogate == "gmpo":  # its ratio is one of its own
        unused.update(dict.fromkeys((*ratio, "kl_importance_weighted"), surrogate))
    elif config.surrogate in WITHOUT_RATIO and not config.kl_importance_weighted:
        unused.update(dict.fromkeys(ratio, f"{surrogate} without kl_importance_weighted"))
    if config.sampler_correction == "none":
        unused.update(sampler_cap="sampler_correction='none'", sampler_floor="sampler_correction='none'")
    reduction = f"reduction={config.reduction!r}"
    if config.reduction != "sequence_mean_token_sum_norm":
        unused.update(max_length=reduction)
    if not config.reduction.startswith("sequence_mean"):
        unused.update(skip_empty_sequences=reduction)
    if config.reduction == "none":
        unused.update(entropy_reduction=reduction)
    for name, reason in unused.items():
        if getattr(config, name) != fields[name]:
            raise ValueError(f"GRPOLossConfig: {name}={getattr(config, name)!r} has no effect with {reason}")


def _defaults(config: GRPOLossConfig) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(config) if field.init}
