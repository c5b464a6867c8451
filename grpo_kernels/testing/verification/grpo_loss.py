"""Cases of grpo_loss: every variant, padded and packed, and every reduction of those that differ in structure."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import grpo_kernels
from grpo_kernels.grpo_loss.choices import REDUCTIONS
from grpo_kernels.grpo_loss.metrics import NAMES
from grpo_kernels.testing.verification.case import (
    EVERY_DTYPE,
    FLOAT32,
    FLOAT64,
    Case,
    Inputs,
    Outputs,
    gradients,
    leaf,
)

PRESETS = (
    "grpo",
    "bnpo",
    "dr_grpo",
    "dapo",
    "luspo",
    "cispo",
    "sapo",
    "vespo",
    "gspo",
    "gspo_token",
    "gmpo",
    "gpg",
    "dppo_tv",
    "dppo_kl",
    "dro",
    "clip_cov",
    "kl_cov",
    "reinforce",
)
_KL: dict[str, Any] = {"kl_coef": 0.3}
_SEQUENCE: dict[str, Any] = {"ratio_level": "sequence"}
VARIANTS: dict[str, dict[str, Any]] = {
    "ppo": {},
    "ppo asymmetric": {"clip_low": 0.1, "clip_high": 0.28},
    "ppo without a lower bound": {"clip_low": 10.0},
    "ppo delta": {"delta": 1.5},
    "ppo delta inside the clip range": {"delta": 1.05},
    "ppo dual clip": {"dual_clip": 1.4},
    "gspo": {**_SEQUENCE, "clip_low": 0.01, "clip_high": 0.02},
    "cispo cap": {"surrogate": "cispo", "ratio_cap": 1.2},
    "cispo bounds": {"surrogate": "cispo", "clip_low": 0.1},
    "cispo sequence": {**_SEQUENCE, "surrogate": "cispo", "clip_low": 0.02},
    "sapo": {"surrogate": "sapo"},
    "sapo sequence": {**_SEQUENCE, "surrogate": "sapo", "sapo_temperature_neg": 2.0},
    "vespo": {"surrogate": "vespo"},
    "vespo token_truncate": {"surrogate": "vespo", "sampler_correction": "token_truncate", "sampler_cap": 1.1},
    "vespo token_mask": {"surrogate": "vespo", "sampler_correction": "token_mask", "sampler_floor": 0.9},
    "reinforce": {"surrogate": "reinforce"},
    "gspo token": {"ratio_level": "sequence_token", "clip_low": 0.01, "clip_high": 0.02},
    "gmpo": {"surrogate": "gmpo", "clip_low": 0.15, "clip_high": 0.2},
    "dppo_tv": {"surrogate": "dppo_tv", "clip_low": 0.03, "clip_high": 0.05, "ratio_cap": 1.3},
    "dppo_kl": {"surrogate": "dppo_kl", "clip_low": 0.004, "clip_high": 0.01},
    "dro": {"surrogate": "dro", "dro_beta": 0.7},
    "clip_cov": {"surrogate": "clip_cov", "clip_cov_ratio": 1.0, "clip_cov_low": 0.05, "clip_cov_high": 0.6},
    "kl_cov": {"surrogate": "kl_cov", "kl_cov_ratio": 0.3, "kl_cov_coef": 0.4},
    "log-ratio clamped": {"log_ratio_min": -0.25, "log_ratio_max": 0.3, "clip_low": 0.5},
    "log-ratio clamped sequence": {**_SEQUENCE, "log_ratio_min": -0.01, "log_ratio_max": 0.01},
    "k1": {**_KL, "kl_estimator": "k1"},
    "k2": {**_KL, "kl_estimator": "k2"},
    "k3": _KL,
    "abs": {**_KL, "kl_estimator": "abs"},
    "k1+": {**_KL, "kl_estimator": "k1+", "kl_importance_weighted": True},
    "k3+": {**_KL, "kl_estimator": "k3+"},
    "k3 clamped": {**_KL, "kl_log_ratio_clamp": 0.4, "kl_value_clamp": 0.05},
    "k3 weighted": {**_KL, "kl_importance_weighted": True},
    "k3 weighted sequence": {**_KL, **_SEQUENCE, "kl_importance_weighted": True},
    "k3 weighted reinforce": {**_KL, **_SEQUENCE, "kl_importance_weighted": True, "surrogate": "reinforce"},
    "token_truncate": {"sampler_correction": "token_truncate", "sampler_cap": 1.2, "sampler_floor": 0.9},
    "token_mask": {"sampler_correction": "token_mask", "sampler_cap": 1.2},
    "sequence_truncate": {"sampler_correction": "sequence_truncate", "sampler_cap": None, "sampler_floor": 1.0},
    "sequence_mask": {"sampler_correction": "sequence_mask", "sampler_cap": 2.5, "sampler_floor": 0.3},
    "off-policy mask": {"off_policy_threshold": 0.02},
    "entropy mask": {"top_entropy_quantile": 0.37},
    "entropy bonus": {"entropy_coef": 0.2},
    "everything": {
        **_SEQUENCE,
        "kl_coef": 0.3,
        "kl_importance_weighted": True,
        "kl_estimator": "k2",
        "sampler_correction": "sequence_truncate",
        "off_policy_threshold": 0.02,
        "top_entropy_quantile": 0.61,
        "entropy_coef": 0.2,
    },
}
"""Fields of GRPOLossConfig, except the reduction."""

_LENGTHS = (200, 37, 1, 0, 129, 300)
_LONG = (1024, 0, 1400, 1025)
"""Kernels cut rows into segments of 1024 tokens."""
_OUTSIDE = (2, 3)
"""Packed tokens before the first sequence and behind the last."""
Change = Callable[[Inputs], None]


def _batch(generator: torch.Generator, packed: bool, change: Change | None, of: tuple[int, ...] = _LENGTHS) -> Inputs:
    """Ragged rows with holes, one of a single token, one of none, one of advantage 0. NaN stands behind the mask."""
    lengths = torch.tensor(of)[:, None]
    shape = (len(of), max(of))

    def normal(scale: float) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    log_probs = -3 * torch.rand(shape, generator=generator)
    old = log_probs + normal(0.2)
    mask = torch.arange(shape[1]) < lengths
    mask &= (torch.rand(shape, generator=generator) > 0.15) | (lengths == 1)
    inputs: Inputs = {
        "log_probs": log_probs,
        "old_log_probs": old,
        "ref_log_probs": log_probs + normal(0.3),
        "sampler_log_probs": torch.where(torch.rand(shape, generator=generator) < 0.05, math.nan, old + normal(0.05)),
        "entropy": 2 * torch.rand(shape, generator=generator),
        "mask": mask,
        "advantages": normal(1.0)[:, 0],
    }
    inputs["advantages"][1] = 0
    if change is not None:
        change(inputs)
    for name, value in inputs.items():
        if _is_per_token(value, shape) and value.is_floating_point():
            inputs[name] = torch.where(mask, value, math.nan)
    return _pack(inputs, shape) if packed else inputs


def _is_per_token(value: Any, shape: tuple[int, ...]) -> bool:
    return isinstance(value, Tensor) and tuple(value.shape) == shape


def _pack(inputs: Inputs, shape: tuple[int, ...]) -> Inputs:
    """The rows end to end, between tokens that belong to no sequence."""
    packed = dict(inputs)
    for name, value in inputs.items():
        if _is_per_token(value, shape):
            outside = math.nan if value.is_floating_point() else 1
            before, behind = (value.new_full((count,), outside) for count in _OUTSIDE)
            packed[name] = torch.cat([before, value.reshape(-1), behind])
    packed["cu_seqlens"] = _OUTSIDE[0] + torch.arange(shape[0] + 1) * shape[1]
    return packed


def _run(inputs: Inputs, config: grpo_kernels.GRPOLossConfig) -> Outputs:
    leaves = {name: leaf(inputs[name]) for name in ("log_probs", "entropy")}
    arguments = {**inputs, **leaves, "config": config}
    if "cu_seqlens" in inputs and config.reduction == "sequence_mean_token_sum_norm":
        arguments["max_length"] = max(_LENGTHS)
    output = grpo_kernels.grpo_loss(**arguments)
    result = gradients({"loss": output.loss}, leaves)
    metrics = zip(NAMES, output.metrics.values.cpu().unbind(), strict=True)  # one copy from the device, not thirty
    return {**result, **{f"metric {name}": value for name, value in metrics}}


# --- inputs other than the batch as it is ----------------------------------------------------------------------------


def _on_policy(inputs: Inputs) -> None:
    inputs["old_log_probs"] = None


def _token_advantages(inputs: Inputs) -> None:
    inputs["advantages"] = inputs["old_log_probs"].flip(1) + 1.5


def _token_weights(inputs: Inputs) -> None:
    inputs["token_weights"] = inputs["entropy"].flip(1) + 0.5


def _sequence_weights(inputs: Inputs) -> None:
    inputs["token_weights"] = inputs["entropy"][:, :1] + 0.5


def _no_sampler(inputs: Inputs) -> None:
    inputs["sampler_log_probs"] = None


def _coefficient_tensors(inputs: Inputs) -> None:
    inputs.update(kl_coef=torch.tensor(0.25), entropy_coef=torch.tensor(0.125), num_items=torch.tensor(1000.0))


def _num_items(inputs: Inputs) -> None:
    inputs["num_items"] = 777


def _nothing_live(inputs: Inputs) -> None:
    inputs["mask"][:] = False


def _number_mask(inputs: Inputs) -> None:
    inputs["mask"] = inputs["mask"].long() * 3


def _nan_tokens(inputs: Inputs) -> None:
    inputs["log_probs"][0, 5] = math.nan
    inputs["old_log_probs"][4, 100] = math.nan


def _overflow(inputs: Inputs) -> None:
    """Ratios that overflow where the clip, or an advantage of 0, holds them; equal infinities."""
    inputs["log_probs"][0, ::31], inputs["old_log_probs"][0, ::31] = -0.5, -800.0
    inputs["log_probs"][1, ::7], inputs["old_log_probs"][1, ::7] = -0.5, -math.inf
    inputs["log_probs"][5, 3], inputs["old_log_probs"][5, 3] = -math.inf, -math.inf
    inputs["advantages"][0] = 1.0


CHANGES: list[tuple[str, str, str, Change]] = [
    ("on-policy", "ppo", "token_mean", _on_policy),
    ("on-policy", "gspo", "sequence_mean_token_mean", _on_policy),
    ("token advantages", "ppo", "token_mean", _token_advantages),
    ("token advantages", "gspo", "sequence_mean_token_sum", _token_advantages),
    ("token advantages", "everything", "none", _token_advantages),
    ("token weights", "ppo", "sequence_mean_token_mean", _token_weights),
    ("token weights", "everything", "token_mean", _token_weights),
    ("sequence weights", "k3", "token_mean", _sequence_weights),
    ("no sampler", "off-policy mask", "token_mean", _no_sampler),
    ("coefficients as tensors", "everything", "token_mean", _coefficient_tensors),
    ("num_items", "ppo", "token_mean", _num_items),
    ("num_items", "gspo", "sequence_mean_token_mean", _num_items),
    ("nothing live", "everything", "token_mean", _nothing_live),
    ("nothing live", "everything", "none", _nothing_live),
    ("number mask", "k3", "sequence_mean_token_mean", _number_mask),
    ("NaN tokens", "k3", "none", _nan_tokens),
    ("NaN tokens", "gspo", "none", _nan_tokens),
    ("NaN tokens", "ppo", "token_mean", _nan_tokens),
    ("overflow", "ppo", "token_mean", _overflow),
    ("overflow", "log-ratio clamped", "none", _overflow),
    ("token advantages", "gmpo", "sequence_mean_token_mean", _token_advantages),
    ("token weights", "dro", "token_sum", _token_weights),
    ("token weights", "kl_cov", "none", _token_weights),
    ("nothing live", "kl_cov", "token_mean", _nothing_live),
]
_STRUCTURES = ("ppo", "gspo", "vespo", "everything")
"""Each of them walks the tokens in another way."""


def _cases(
    name: str, config: grpo_kernels.GRPOLossConfig, change: Change | None = None, lengths: tuple[int, ...] = _LENGTHS
) -> list[Case]:
    """The case padded and packed. The inputs are converted before the kernel: 16 bits in some variants will do."""
    dtypes = EVERY_DTYPE if name.startswith(("preset", "everything")) else (FLOAT32, FLOAT64)
    return [
        Case(
            "grpo_loss",
            f"{name}, {config.reduction}, {'packed' if packed else 'padded'}",
            functools.partial(_batch, packed=packed, change=change, of=lengths),
            functools.partial(_run, config=config),
            dtypes,
            seeds=4,
        )
        for packed in (False, True)
    ]


def preset(name: str) -> grpo_kernels.GRPOLossConfig:
    """The preset; what "clip_cov" draws at random is all that it may draw."""
    overrides = {"clip_cov_ratio": 1.0} if name == "clip_cov" else {}
    return grpo_kernels.GRPOLossConfig.preset(name, **overrides)


def _every_case() -> list[Case]:
    config = grpo_kernels.GRPOLossConfig
    cases = [case for name in PRESETS for case in _cases(f"preset {name}", preset(name))]
    for place, (name, fields) in enumerate(VARIANTS.items()):
        reductions = REDUCTIONS if name in _STRUCTURES else (REDUCTIONS[place % len(REDUCTIONS)],)
        for reduction in reductions:
            cases += _cases(name, config(reduction=reduction, **fields))
    for name, variant, reduction, change in CHANGES:
        cases += _cases(f"{variant}, {name}", config(reduction=reduction, **VARIANTS[variant]), change)
    through = config(
        reduction="sequence_mean_token_mean", skip_empty_sequences=True, entropy_coef=0.2, entropy_reduction="loss"
    )
    cases += _cases("ppo, entropy and loss without empty sequences", through)
    for variant in ("ppo", "gspo", "gmpo"):
        long = config(reduction="sequence_mean_token_mean", **VARIANTS[variant])
        cases += _cases(f"{variant}, long rows", long, lengths=_LONG)
    return cases


CASES = _every_case()
