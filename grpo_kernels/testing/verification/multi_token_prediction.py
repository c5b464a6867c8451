"""Cases of mtp_linear_cross_entropy, and of the targets that it is made for."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import grpo_kernels
from grpo_kernels import _dispatch
from grpo_kernels.multi_token_prediction.reference import mtp_targets
from grpo_kernels.testing.verification.case import EVERY_DTYPE, FLOAT32, Case, Inputs, Outputs, gradients
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

_OP = "mtp_linear_cross_entropy"
_VOCAB, _WIDTH = 131, 24
_LENGTHS = (14, 9, 1, 0, 11)
_SEEDS = 8
"""Batches of each case: the error of the single number that a loss is would be luck."""

# --- inputs ----------------------------------------------------------------------------------------------------------


def _make(
    generator: torch.Generator, depths: int, shift: int, layout: str, optional: str, policy: bool, change: Change | None
) -> Inputs:
    """Every depth's states lean towards the token that they predict. Where they predict none they are NaN."""
    shape = (len(_LENGTHS), max(_LENGTHS))
    made = head(generator, (depths + 1, *shape), _WIDTH, _VOCAB, 2.0, optional)
    made["token_ids"] = torch.randint(_VOCAB, shape, generator=generator)
    made["mask"] = torch.arange(shape[1]) < torch.tensor(_LENGTHS)[:, None]
    made["mask"] &= torch.rand(shape, generator=generator) < 0.9
    made["token_ids"][0, 3], made["token_ids"][4, 5] = -100, -7
    if "temperatures" in optional:
        made["temperature"] = torch.rand(shape, generator=generator) + 0.5
    if change is not None:
        change(made)
    _lean(made, shift)
    if policy:
        _add_policy(made, generator)
    if layout != "padded":
        _pack(made, layout, shape)
    return made


def _lean(made: Inputs, shift: int) -> None:
    ids, hidden = made["token_ids"], made["hidden"]
    mask = None if made["mask"] is None else made["mask"].reshape(-1)
    targets, _ = mtp_targets(ids.reshape(-1), None, mask, len(hidden), shift, ids.shape[1], -100)
    targets = targets.view(hidden.shape[:-1])
    lean = made["weight"][targets.clamp(min=0)] * 2.0
    made["hidden"] = torch.where((targets >= 0)[..., None], hidden + lean, math.nan)


def _add_policy(made: Inputs, generator: torch.Generator) -> None:
    """Log-probs near those of depth 0."""
    first = {name: value for name, value in made.items() if name not in ("mask", "token_ids")}
    ids = made["token_ids"].clamp(min=0)
    with _dispatch.backend("reference"):
        log_probs = call(
            grpo_kernels.linear_token_log_probs, {**first, "hidden": made["hidden"][0], "token_ids": ids}, {}
        ).log_probs
    for name, scale in (("old_log_probs", 0.15), ("ref_log_probs", 0.3)):
        noise = scale * torch.randn(log_probs.shape, generator=generator)
        made[name] = torch.where(made["mask"], log_probs + noise, math.nan)
    made["advantages"] = torch.randn(len(_LENGTHS), generator=generator) + 1.5


def _pack(made: Inputs, layout: str, shape: tuple[int, int]) -> None:
    """The documents end to end, between two rows that belong to none."""
    keep = torch.arange(shape[1]) < torch.tensor(_LENGTHS)[:, None]

    def pack(value: Tensor) -> Tensor:
        outside = torch.full_like(value[:1, 0], math.nan if value.is_floating_point() else 1)
        return torch.cat([outside, value[keep], outside])

    for name, value in list(made.items()):
        if name == "hidden":
            made[name] = torch.stack([pack(states) for states in value])
        elif isinstance(value, Tensor) and value.shape[:2] == shape:
            made[name] = pack(value)
    ends = 1 + torch.tensor(_LENGTHS).cumsum(0)
    if layout == "cu_seqlens":
        made["cu_seqlens"] = torch.tensor([1, *ends.tolist()])
    else:
        rows = torch.arange(shape[1]).expand(shape)[keep]
        made["positions"] = torch.cat([torch.tensor([-1]), rows, torch.tensor([-1])]).to(made["token_ids"].dtype)


# --- calls -----------------------------------------------------------------------------------------------------------

_POLICY = ("old_log_probs", "ref_log_probs", "advantages")


def _loss(**given: Any) -> grpo_kernels.MTPLossOutput:
    terms = {name: given.pop(name) for name in (*_POLICY, "config") if name in given}
    if terms:
        given["policy"] = grpo_kernels.PolicyTerms(**terms)
    return grpo_kernels.mtp_linear_cross_entropy(given.pop("hidden"), given.pop("weight"), **given)


def _values(inputs: Inputs, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """Everything but the metrics, which are those of linear_grpo_loss."""
    result = call(_loss, inputs, options)._asdict()
    return {name: value for name, value in result.items() if isinstance(value, Tensor)}


def _run(inputs: Inputs, options: Mapping[str, Any], frozen: tuple[str, ...]) -> Outputs:
    leaves = leaves_of(inputs, frozen)
    return gradients(_values({**inputs, **leaves}, options), leaves)


def _run_accumulated(inputs: Inputs, options: Mapping[str, Any], frozen: tuple[str, ...]) -> Outputs:
    return accumulated(_OP, inputs, lambda given, more: _values(given, {**options, **more}))


def _run_targets(inputs: Inputs, options: Mapping[str, Any], frozen: tuple[str, ...]) -> Outputs:
    """The registered op by itself."""
    ids = inputs["token_ids"].reshape(-1)
    length = inputs["token_ids"].shape[1] if inputs["token_ids"].ndim == 2 else 0
    targets, counts = torch.ops.grpo_kernels.mtp_targets(
        ids, inputs.get("positions"), inputs["mask"].reshape(-1), len(inputs["hidden"]), options["shift"], length,
        -100, _dispatch.resolve(_OP, inputs["hidden"]),
    )  # fmt: skip
    return {"targets": targets, "counts": counts}


# --- what is unusual about the inputs --------------------------------------------------------------------------------


def _no_mask(inputs: Inputs) -> None:
    inputs["mask"] = None


def _nothing_counts(inputs: Inputs) -> None:
    inputs["mask"][:] = False


def _no_rows(inputs: Inputs) -> None:
    inputs["hidden"] = inputs["hidden"][:, :0]
    inputs.update({name: inputs[name][:0] for name in ("token_ids", "mask")})


def _numbers(inputs: Inputs) -> None:
    inputs["depth_weights"] = torch.tensor([0.5, 1.0, 0.25])
    inputs["num_items"] = torch.tensor(37.0)


def _narrow_ids(inputs: Inputs) -> None:
    inputs["token_ids"] = inputs["token_ids"].int()


# --- cases -----------------------------------------------------------------------------------------------------------


def _case(
    name: str,
    dtypes: tuple[torch.dtype, ...] = EXACT,
    *,
    depths: int = 2,
    shift: int = 1,
    layout: str = "padded",
    optional: str = "",
    change: Change | None = None,
    frozen: tuple[str, ...] = (),
    run: Run = _run,
    **options: Any,
) -> Case:
    make = functools.partial(
        _make, depths=depths, shift=shift, layout=layout, optional=optional, policy="config" in options, change=change
    )
    called = functools.partial(run, options={**options, "shift": shift}, frozen=frozen)
    return Case(_OP, f"{name}, {layout}, D={depths}", make, called, dtypes, seeds=_SEEDS)


def _config(**fields: Any) -> grpo_kernels.GRPOLossConfig:
    return grpo_kernels.GRPOLossConfig(**fields)


_RICH: dict[str, Any] = {"kl_coef": 0.3, "entropy_coef": 0.2}
_LOSSES = [
    _case("plain", EVERY_DTYPE),
    _case("plain", TRAINING, layout="positions", depths=3),
    _case("plain", TRAINING, layout="cu_seqlens", depths=1),
    _case("one depth", (FLOAT32,), depths=0),
    _case("without a mask", (FLOAT32,), change=_no_mask),
    _case("already shifted, ids of 32 bits", (FLOAT32,), shift=0, layout="positions", change=_narrow_ids),
    _case("z-loss, softcap, scale", z_loss=0.3, softcap=5.0, logit_scale=1.1),
    _case("bias, lora, temperatures", TRAINING, optional="bias, lora, temperatures", z_loss=0.01),
    _case("lora alone", optional="lora", frozen=("hidden", "weight"), layout="cu_seqlens"),
    _case("weights and number of tokens", TRAINING, change=_numbers),
    _case("divided by depth 0's count", (FLOAT32,), normalizer="tokens", depth_weights=[1.0, 0.5, 0.0]),
    _case("detached head", TRAINING, optional="bias", detach_head=True),
    _case("accumulator", TRAINING, run=_run_accumulated),
    _case("nothing counts", (FLOAT32,), change=_nothing_counts),
    _case("no rows", (FLOAT32,), change=_no_rows),
]
_POLICIES = [
    _case("GRPO, KL and entropy", EVERY_DTYPE, shift=0, config=_config(**_RICH)),
    _case("GRPO, KL and entropy", TRAINING, shift=0, layout="cu_seqlens", depths=1, config=_config(**_RICH)),
    _case("GRPO, bias, lora, detached head", shift=0, optional="bias, lora", detach_head=True, config=_config(**_RICH)),
    _case("GRPO, on-policy", shift=0, old_log_probs=None, config=_config(reduction="token_mean")),
    _case("GSPO", shift=0, layout="cu_seqlens", config=grpo_kernels.GRPOLossConfig.preset("gspo")),
    _case("GRPO, accumulator", (FLOAT32,), shift=0, run=_run_accumulated, config=_config(kl_coef=0.3)),
    _case("GRPO, nothing counts", (FLOAT32,), shift=0, change=_nothing_counts, config=_config(**_RICH)),
]
_TARGETS = [
    _case("targets alone", (FLOAT32,), run=_run_targets, depths=depths, shift=shift, layout=layout)
    for depths, shift, layout in ((0, 1, "padded"), (3, 1, "padded"), (2, 0, "positions"), (15, 2, "positions"))
]

CASES = [*_LOSSES, *_POLICIES, *_TARGETS]
