"""Cases of moe_router. Logits lie on a grid that every dtype holds: no choice hangs on rounding."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

import grpo_kernels
from grpo_kernels.testing.verification.case import (
    BFLOAT16,
    EVERY_DTYPE,
    FLOAT32,
    FLOAT64,
    Case,
    Inputs,
    Outputs,
    gradients,
    leaf,
)

_TOKENS = 67
_GRID = 1 / 16
_BATCHES = 8
_TRAINING = (FLOAT32, BFLOAT16, FLOAT64)
Change = Callable[[Inputs, torch.Generator], None]


def _make(
    generator: torch.Generator, experts: int, tokens: int, biased: bool, spoil: Change | None, ties: bool
) -> Inputs:
    """Every row a shuffled grid around 0, so that no two logits are equal; or, with ties, one of few values."""
    order = torch.rand(tokens, experts, generator=generator).argsort(1)
    values = order % 5 if ties else order
    made: Inputs = {"logits": (values - (2 if ties else experts // 2)) * _GRID}
    if biased:
        made["bias"] = (torch.randn(experts, generator=generator) * 12).round() / 64
    if spoil is not None:
        spoil(made, generator)
    return made


def _run(inputs: Inputs, top_k: int, wide: bool, options: dict[str, Any]) -> Outputs:
    """`wide`: the logits are some of the columns of a larger matrix."""
    logits = leaf(inputs["logits"])
    seen = torch.nn.functional.pad(logits, (3, 2), value=math.nan)[:, 3:-2] if wide else logits
    given = {name: value for name, value in inputs.items() if name not in ("logits", "bias")}
    if "bias" in inputs:
        exact = FLOAT64 if logits.dtype == FLOAT64 else FLOAT32
        given["e_score_correction_bias"] = inputs["bias"].to(exact)
    result = grpo_kernels.moe_router(seen, top_k, **given, **options)
    return gradients(result._asdict(), {"logits": logits})


# --- what is unusual about the inputs --------------------------------------------------------------------------------


def _broken(inputs: Inputs, generator: torch.Generator) -> None:
    """NaN and infinities: some experts impossible, some tokens lost."""
    logits = inputs["logits"]
    logits[3, ::2], logits[7, 1:] = -math.inf, -math.inf
    logits[11, 0], logits[19] = math.nan, math.nan
    logits[23, -1], logits[29] = math.inf, -math.inf


def _masked(inputs: Inputs, generator: torch.Generator) -> None:
    """Behind the mask there is anything."""
    inputs["token_mask"] = torch.rand(len(inputs["logits"]), generator=generator) < 0.7
    inputs["logits"][~inputs["token_mask"]] = math.nan


def _packed(inputs: Inputs, generator: torch.Generator) -> None:
    """Sequences of all lengths, an empty one and one that is masked altogether."""
    _masked(inputs, generator)
    tokens = len(inputs["logits"])
    inputs["cu_seqlens"] = torch.tensor([0, 1, 9, 9, 20, tokens // 2, tokens])
    inputs["token_mask"][9:20] = False


def _replayed(inputs: Inputs, generator: torch.Generator, top_k: int, dtype: torch.dtype, missing: bool) -> None:
    """Routes of other logits, in any order; of some tokens none, of others a part."""
    noise = torch.randn(inputs["logits"].shape, generator=generator)
    ids = (inputs["logits"] + noise).argsort(1)[:, -top_k:]
    if missing:
        ids[torch.rand(ids.shape, generator=generator) < 0.3] = -1
        ids[::5] = -1
    inputs["replay_ids"] = ids.to(dtype)


def _replayed_and_masked(inputs: Inputs, generator: torch.Generator) -> None:
    _replayed(inputs, generator, 8, torch.int64, True)
    _packed(inputs, generator)


# --- cases -----------------------------------------------------------------------------------------------------------


def _case(
    name: str,
    experts: int,
    top_k: int,
    dtypes: tuple[torch.dtype, ...] = _TRAINING,
    *,
    tokens: int = _TOKENS,
    biased: bool = False,
    spoil: Change | None = None,
    ties: bool = False,
    wide: bool = False,
    **options: Any,
) -> Case:
    make = functools.partial(_make, experts=experts, tokens=tokens, biased=biased, spoil=spoil, ties=ties)
    run = functools.partial(_run, top_k=top_k, wide=wide, options=options)
    losses = any(option.endswith("_loss_coef") for option in options)
    return Case("moe_router", f"{name}, E={experts} K={top_k}", make, run, dtypes, _BATCHES if losses else 1)


_DEEPSEEK: dict[str, Any] = {"scoring_func": "sigmoid", "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5}
_LOSSES: dict[str, Any] = {"z_loss_coef": 0.5, "aux_loss_coef": 0.25, "seq_aux_loss_coef": 2.0}

CASES = [
    _case("DeepSeek-V3", 256, 8, EVERY_DTYPE, biased=True, **_DEEPSEEK),
    _case("DeepSeek-V3, one group", 160, 8, biased=True, scoring_func="sigmoid", routed_scaling_factor=2.5),
    _case("Qwen3", 128, 8, EVERY_DTYPE),
    _case("Qwen2, not renormalised", 64, 6, norm_topk_prob=False),
    _case("gpt-oss", 32, 4, EVERY_DTYPE, scoring_func="topk_softmax"),
    _case("gpt-oss with a bias, ties", 32, 4, biased=True, scoring_func="topk_softmax"),
    _case("DeepSeek-V4", 96, 6, biased=True, scoring_func="sqrtsoftplus", routed_scaling_factor=1.5),
    _case("sqrtsoftplus, not renormalised", 40, 3, scoring_func="sqrtsoftplus", norm_topk_prob=False),
    _case("Llama-4", 16, 1, scoring_func="sigmoid", norm_topk_prob=False),
    _case("groups by their best", 60, 6, scoring_func="softmax", n_group=6, topk_group=2, group_score="max"),
    _case("groups of one", 16, 4, biased=True, scoring_func="sigmoid", n_group=16, topk_group=5),
    _case("every expert", 5, 5),
    _case("as large as it gets", 1024, 32, (FLOAT32, FLOAT64), tokens=9),
    _case("ties", 72, 8, EVERY_DTYPE, ties=True),
    _case("ties of groups", 64, 8, ties=True, scoring_func="sigmoid", n_group=8, topk_group=3),
    _case("columns of a larger matrix", 37, 4, wide=True),
    _case("NaN and infinite logits", 48, 4, EVERY_DTYPE, spoil=_broken),
    _case("NaN and infinite logits, groups", 64, 8, biased=True, spoil=_broken, **_DEEPSEEK),
    _case("mask", 64, 8, spoil=_masked),
    _case("losses", 64, 8, EVERY_DTYPE, **_LOSSES),
    _case("losses of packed sequences", 64, 8, spoil=_packed, **_LOSSES),
    _case("losses of packed sequences, DeepSeek-V3", 64, 8, biased=True, spoil=_packed, **_DEEPSEEK, **_LOSSES),
    _case("losses, sqrtsoftplus", 32, 4, scoring_func="sqrtsoftplus", **_LOSSES),
    _case("losses, gpt-oss", 32, 4, spoil=_masked, scoring_func="topk_softmax", **_LOSSES),
    _case(
        "replay", 64, 6, spoil=functools.partial(_replayed, top_k=6, dtype=torch.uint8, missing=False),
    ),
    _case(
        "replay of a part", 300, 8, spoil=functools.partial(_replayed, top_k=8, dtype=torch.int16, missing=True),
        biased=True, scoring_func="sigmoid",
    ),
    _case("replay, mask, losses", 64, 8, biased=True, spoil=_replayed_and_masked, **_DEEPSEEK, **_LOSSES),
    _case("one token", 64, 8, tokens=1, biased=True, **_DEEPSEEK, **_LOSSES),
    _case("no tokens", 16, 4, tokens=0, **_LOSSES),
]  # fmt: skip
