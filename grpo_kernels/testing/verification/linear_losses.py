"""Cases of linear_cross_entropy and linear_grpo_loss."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import grpo_kernels
from grpo_kernels import _dispatch
from grpo_kernels.testing.verification.case import EVERY_DTYPE, Case, Inputs, Outputs, gradients
from grpo_kernels.testing.verification.grpo_loss import PRESETS, preset
from grpo_kernels.testing.verification.linear_head import (
    EXACT,
    TRAINING,
    Change,
    Run,
    accumulated,
    call,
    head,
    leaves_of,
)

_VOCAB = 131
_SEEDS = 8
"""Batches of each case: the error of the single number that a loss is would be luck."""
_REDUCTIONS = ("mean", "sum", "none")

# --- linear_cross_entropy --------------------------------------------------------------------------------------------


def _make_targets(generator: torch.Generator, optional: str, spoil: Change | None, rows: int, width: int) -> Inputs:
    made = head(generator, (rows,), width, _VOCAB, 3.0, optional)
    made["target"] = torch.randint(_VOCAB, (rows,), generator=generator)
    if spoil is not None:
        spoil(made)
    return made


def _cross_entropy(inputs: Inputs, options: Mapping[str, Any]) -> dict[str, Tensor]:
    return {"loss": call(grpo_kernels.linear_cross_entropy, inputs, options)}


def _run_targets(inputs: Inputs, options: Mapping[str, Any], frozen: tuple[str, ...]) -> Outputs:
    leaves = leaves_of(inputs, frozen)
    return gradients(_cross_entropy({**inputs, **leaves}, options), leaves)


def _run_targets_accumulated(inputs: Inputs, options: Mapping[str, Any], frozen: tuple[str, ...]) -> Outputs:
    return accumulated("linear_cross_entropy", inputs, lambda given, more: _cross_entropy(given, {**options, **more}))


def _ignored(inputs: Inputs) -> None:
    inputs["target"][1::3] = -100
    inputs["hidden"][1::3] = math.nan


def _all_ignored(inputs: Inputs) -> None:
    inputs["target"][:] = -100


def _ignore_seven(inputs: Inputs) -> None:
    inputs["target"][::4] = 7


def _no_targets(inputs: Inputs) -> None:
    inputs.update({name: inputs[name][:0] for name in ("hidden", "target")})


def _targets(
    name: str,
    dtypes: tuple[torch.dtype, ...] = EXACT,
    *,
    optional: str = "",
    spoil: Change | None = None,
    rows: int = 60,
    width: int = 24,
    frozen: tuple[str, ...] = (),
    reductions: tuple[str, ...] = ("mean",),
    run: Run = _run_targets,
    **options: Any,
) -> list[Case]:
    """With each of the reductions."""
    make = functools.partial(_make_targets, optional=optional, spoil=spoil, rows=rows, width=width)
    return [
        Case(
            "linear_cross_entropy",
            f"{name}, {reduction}",
            make,
            functools.partial(run, options={**options, "reduction": reduction}, frozen=frozen),
            dtypes,
            seeds=_SEEDS,
        )
        for reduction in reductions
    ]


_CROSS_ENTROPY = [
    *_targets("plain", EVERY_DTYPE, reductions=_REDUCTIONS),
    *_targets("z-loss, ignored tokens", TRAINING, reductions=_REDUCTIONS, spoil=_ignored, z_loss=0.3),
    *_targets("bias, lora", TRAINING, optional="bias, lora", spoil=_ignored, z_loss=0.01),
    *_targets("softcap, scale", softcap=5.0, logit_scale=1.1, z_loss=0.01),
    *_targets("lora alone", optional="lora", frozen=("hidden", "weight")),
    *_targets("accumulator", TRAINING, reductions=("mean", "none"), run=_run_targets_accumulated),
    *_targets("ignore_index inside the vocabulary", spoil=_ignore_seven, ignore_index=7),
    *_targets("ragged sizes", TRAINING, rows=131, width=37),
    *_targets("everything ignored", reductions=_REDUCTIONS, spoil=_all_ignored),
    *_targets("no rows", reductions=_REDUCTIONS, spoil=_no_targets),
]

# --- linear_grpo_loss ------------------------------------------------------------------------------------------------

_LENGTHS = (14, 9, 1, 0, 11)


def _make_policy(
    generator: torch.Generator,
    optional: str,
    packed: bool,
    change: Change | None,
    width: int,
    transform: Mapping[str, float],
) -> Inputs:
    """Ragged rows; old log-probs near those of the head, NaN behind the mask."""
    lengths = torch.tensor(_LENGTHS)[:, None]
    shape = (len(_LENGTHS), max(_LENGTHS))
    made = head(generator, shape, width, _VOCAB, 2.0, optional)
    made["token_ids"] = torch.randint(_VOCAB, shape, generator=generator)
    mask = torch.arange(shape[1]) < lengths
    if "temperatures" in optional:
        made["temperature"] = torch.rand(shape, generator=generator) + 0.5
    with _dispatch.backend("reference"):
        log_probs = call(grpo_kernels.linear_token_log_probs, made, transform).log_probs

    def near(value: Tensor, scale: float) -> Tensor:
        return value + scale * torch.randn(shape, generator=generator)

    made |= {
        "old_log_probs": near(log_probs, 0.15),
        "ref_log_probs": near(log_probs, 0.3),
        "advantages": torch.randn(shape[0], generator=generator) + 1.5,
        "mask": mask,
    }
    made["sampler_log_probs"] = near(made["old_log_probs"], 0.05)
    made["advantages"][1] = -0.75
    if change is not None:
        change(made)
    for name, value in made.items():
        if isinstance(value, Tensor) and value.shape[:2] == shape and value.is_floating_point():
            made[name] = torch.where(mask.view(*shape, *[1] * (value.ndim - 2)), value, math.nan)
    made["token_ids"][~mask] = 2**31 - 1
    return _packed(made, shape) if packed else made


def _packed(inputs: Inputs, shape: tuple[int, int]) -> Inputs:
    """The live tokens end to end, between two that belong to no sequence."""
    keep = inputs["mask"]

    def pack(value: Tensor) -> Tensor:
        outside = torch.full_like(value[:1, 0], math.nan if value.is_floating_point() else 1)
        return torch.cat([outside, value[keep], outside])

    packed = {
        name: pack(value) if isinstance(value, Tensor) and value.shape[:2] == shape else value
        for name, value in inputs.items()
    }
    packed["cu_seqlens"] = torch.tensor([1, *(1 + torch.tensor(_LENGTHS).cumsum(0)).tolist()])
    return packed


def _loss(inputs: Inputs, options: Mapping[str, Any]) -> dict[str, Tensor]:
    result = call(grpo_kernels.linear_grpo_loss, inputs, options)
    values = {"loss": result.loss, "log_probs": result.log_probs}
    return values if result.entropy is None else {**values, "entropy": result.entropy}


def _run_policy(inputs: Inputs, options: Mapping[str, Any], frozen: tuple[str, ...]) -> Outputs:
    leaves = leaves_of(inputs, frozen)
    return gradients(_loss({**inputs, **leaves}, _with_length(inputs, options)), leaves)


def _run_policy_accumulated(inputs: Inputs, options: Mapping[str, Any], frozen: tuple[str, ...]) -> Outputs:
    return accumulated(
        "linear_grpo_loss", inputs, lambda given, more: _loss(given, {**_with_length(inputs, options), **more})
    )


def _with_length(inputs: Inputs, options: Mapping[str, Any]) -> dict[str, Any]:
    normed = options["config"].reduction == "sequence_mean_token_sum_norm"
    return {**options, "max_length": max(_LENGTHS)} if normed and "cu_seqlens" in inputs else dict(options)


def _on_policy(inputs: Inputs) -> None:
    inputs["old_log_probs"] = None


def _nothing_live(inputs: Inputs) -> None:
    inputs["mask"][:] = False


def _tensors(inputs: Inputs) -> None:
    """Numbers as tensors, and weights."""
    inputs.update(kl_coef=torch.tensor(0.25), entropy_coef=torch.tensor(0.125), num_items=torch.tensor(64.0))
    inputs["token_weights"] = inputs["advantages"][:, None].sigmoid() + 0.5


def _policy(
    name: str,
    config: grpo_kernels.GRPOLossConfig,
    dtypes: tuple[torch.dtype, ...] = EXACT,
    *,
    optional: str = "",
    change: Change | None = None,
    width: int = 24,
    layouts: tuple[bool, ...] = (False,),
    run: Run = _run_policy,
    **transform: float,
) -> list[Case]:
    return [
        Case(
            "linear_grpo_loss",
            f"{name}, {'packed' if packed else 'padded'}",
            functools.partial(
                _make_policy, optional=optional, packed=packed, change=change, width=width, transform=transform
            ),
            functools.partial(run, options={**transform, "config": config}, frozen=()),
            dtypes,
            seeds=_SEEDS,
        )
        for packed in layouts
    ]


def _config(**fields: Any) -> grpo_kernels.GRPOLossConfig:
    return grpo_kernels.GRPOLossConfig(**fields)


_BOTH = (False, True)
_RICH: dict[str, Any] = {"kl_coef": 0.3, "entropy_coef": 0.2}
_PACKED = ("dapo", "grpo", "gspo", "vespo", "dr_grpo", "gmpo")
_POLICY = [
    *(
        case
        for name in PRESETS
        for case in _policy(
            f"preset {name}",
            preset(name),
            layouts=_BOTH if name in _PACKED else (False,),
        )
    ),
    *_policy("KL and entropy bonus", _config(**_RICH), EVERY_DTYPE, layouts=_BOTH),
    *_policy("bias, lora, softcap", _config(**_RICH), TRAINING, optional="bias, lora", softcap=6.0, logit_scale=1.2),
    *_policy("numbers as tensors, temperatures", _config(**_RICH), TRAINING, optional="temperatures", change=_tensors),
    *_policy("accumulator", _config(**_RICH), TRAINING, run=_run_policy_accumulated),
    *_policy("per token", _config(reduction="none", **_RICH), TRAINING, layouts=_BOTH),
    *_policy("on-policy", _config(reduction="token_mean"), TRAINING, change=_on_policy),
    *_policy("entropy mask", _config(top_entropy_quantile=0.37)),
    *_policy("sampler correction", _config(sampler_correction="sequence_truncate", ratio_level="sequence")),
    *_policy("odd width", _config(kl_coef=0.3), TRAINING, width=37),
    *_policy("nothing live", _config(**_RICH), change=_nothing_live),
]

CASES = [*_CROSS_ENTROPY, *_POLICY]
