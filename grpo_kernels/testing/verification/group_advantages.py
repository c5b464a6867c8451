"""Cases of group_advantages, informative_groups and best_of_group."""

from __future__ import annotations

import functools
from typing import Any

import torch

import grpo_kernels
from grpo_kernels.testing.verification.case import Case, Inputs, Outputs

_BATCH, _GROUP = 1536, 16


def _groups(generator: torch.Generator, ragged: bool) -> Inputs:
    """Equal groups of neighbours, or ids in any order: groups of all sizes, one large, some with a single sample."""
    if not ragged:
        return {"group_size": _GROUP}
    ids = torch.randint(-100, 100, (_BATCH,), generator=generator)
    ids[::7] = 2**40
    ids[5:10] = torch.arange(1000, 1005)
    return {"group_ids": ids}


def _rewards(generator: torch.Generator, ragged: bool, functions: int = 1, missing: bool = False) -> Inputs:
    """Rewards, some groups of which are equal; with `missing`, NaN in places, for whole samples and a whole group."""
    rewards = torch.randn(_BATCH, functions, generator=generator)
    rewards[_GROUP : 2 * _GROUP] = 0.7
    if missing:
        rewards[torch.rand(rewards.shape, generator=generator) < 0.1] = float("nan")
        rewards[torch.rand(_BATCH, generator=generator) < 0.1] = float("nan")
        rewards[2 * _GROUP : 3 * _GROUP] = float("nan")
    return {"rewards": rewards if functions > 1 else rewards[:, 0], **_groups(generator, ragged)}


def _weighted(generator: torch.Generator, ragged: bool) -> Inputs:
    inputs = _rewards(generator, ragged, functions=3, missing=True)
    return {**inputs, "reward_weights": torch.tensor([1.0, -0.5, 0.25])}


def _infinite(generator: torch.Generator, ragged: bool) -> Inputs:
    inputs = _rewards(generator, ragged, functions=2)
    inputs["rewards"][3, 0], inputs["rewards"][100, 1] = float("inf"), float("-inf")
    inputs["rewards"][200, 0], inputs["rewards"][200, 1] = float("inf"), float("-inf")
    return inputs


def _empty(generator: torch.Generator, ragged: bool) -> Inputs:
    inputs = _rewards(generator, ragged)
    return {name: value[:0] if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def _lengths(generator: torch.Generator, ragged: bool, functions: int = 1) -> Inputs:
    """With the lengths of responses: some empty, a whole group of them, and a few long ones."""
    inputs = _rewards(generator, ragged, functions, missing=True)
    lengths = torch.randint(0, 40, (_BATCH,), generator=generator)
    lengths[::97] = 32_768
    lengths[4 * _GROUP : 5 * _GROUP] = 0
    return {**inputs, "lengths": lengths}


def _advantages(options: dict[str, Any], inputs: Inputs) -> Outputs:
    return grpo_kernels.group_advantages(**inputs, **options)._asdict()


_GDPO = {"aggregation": "normalize_then_sum"}
_ADVANTAGES: dict[str, tuple[Any, dict[str, Any]]] = {
    "default": (_rewards, {}),
    "missing": (functools.partial(_rewards, missing=True), {}),
    "functions": (functools.partial(_rewards, functions=3, missing=True), {"eps": 1e-6}),
    "weights": (_weighted, {}),
    "gdpo": (functools.partial(_rewards, functions=3, missing=True), _GDPO),
    "gdpo_weights_raw": (_weighted, {**_GDPO, "singleton": "raw", "correction": 0}),
    "gdpo_leave_one_out": (_weighted, {**_GDPO, "baseline": "leave_one_out"}),
    "leave_one_out": (functools.partial(_rewards, missing=True), {"baseline": "leave_one_out", "normalize_by": "none"}),
    "batch": (functools.partial(_rewards, missing=True), {"normalize_by": "batch"}),
    "leave_one_out_batch": (_weighted, {"baseline": "leave_one_out", "normalize_by": "batch", "correction": 0}),
    "dr_grpo": (functools.partial(_rewards, missing=True), {"normalize_by": "none"}),
    "no_baseline": (_weighted, {"baseline": "none"}),
    "no_baseline_batch": (_rewards, {"baseline": "none", "normalize_by": "batch"}),
    "plain_rewards": (_weighted, {"baseline": "none", "normalize_by": "none"}),
    "raw_singletons": (functools.partial(_rewards, missing=True), {"singleton": "raw", "eps": 1e-6}),
    "population": (_rewards, {"correction": 0}),
    "length_weighted": (_lengths, {"baseline": "length_weighted"}),
    "opo": (_lengths, {"baseline": "length_weighted", "normalize_by": "none", "singleton": "raw"}),
    "second_best": (_weighted, {"baseline": "second_best"}),
    "second_best_gdpo": (_weighted, {**_GDPO, "baseline": "second_best", "singleton": "raw"}),
    "batch_tokens": (_lengths, {"normalize_by": "batch_tokens", "singleton": "raw", "batch_eps": 1e-8}),
    "batch_tokens_population": (_lengths, {"baseline": "none", "normalize_by": "batch_tokens", "correction": 0}),
    "gdpo_batch_tokens": (functools.partial(_lengths, functions=3), {**_GDPO, "normalize_by": "batch_tokens"}),
    "infinite": (_infinite, {}),
    "empty": (_empty, {}),
}


def _choices(generator: torch.Generator, ragged: bool, flags: str | None = None) -> Inputs:
    """Rewards of a few values, so that groups are equal and scores tie; NaN and infinities among them."""
    values = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.5, float("nan"), float("inf"), float("-inf")])
    rewards = values[torch.randint(4, (_BATCH,), generator=generator)]
    rewards[: _BATCH // 2] = values[torch.randint(len(values), (_BATCH // 2,), generator=generator)]
    rewards[_BATCH // 4 * 3 :] = torch.randn(_BATCH // 4, generator=generator)
    inputs = {"rewards": rewards, **_groups(generator, ragged)}
    if flags is not None:
        inputs[flags] = torch.rand(_BATCH, generator=generator) < 0.7
    return inputs


def _informative(options: dict[str, Any], inputs: Inputs) -> Outputs:
    return {"informative": grpo_kernels.informative_groups(**inputs, **options)}


def _best(options: dict[str, Any], inputs: Inputs) -> Outputs:
    inputs = {"scores" if name == "rewards" else name: value for name, value in inputs.items()}
    return grpo_kernels.best_of_group(**inputs, **options)._asdict()


_INFORMATIVE: dict[str, tuple[Any, dict[str, Any]]] = {
    "default": (_choices, {}),
    "mask": (functools.partial(_choices, flags="mask"), {}),
    "tolerance": (functools.partial(_choices, flags="mask"), {"tolerance": 0.6}),
    "exact": (_rewards, {"tolerance": 0.0}),
    "empty": (_empty, {}),
}
_BEST: dict[str, tuple[Any, dict[str, Any]]] = {
    "one": (_choices, {"k": 1}),
    "valid": (functools.partial(_choices, flags="valid"), {"k": 4}),
    "many": (functools.partial(_choices, flags="valid"), {"k": 10**6}),
    "distinct": (_rewards, {"k": 3}),
    "empty": (_empty, {"k": 1}),
}

CASES = [
    Case(
        op,
        f"{name}, {'ragged' if ragged else 'equal'} groups",
        functools.partial(make, ragged=ragged),
        functools.partial(run, options),
    )
    for op, run, table in (
        ("group_advantages", _advantages, _ADVANTAGES),
        ("informative_groups", _informative, _INFORMATIVE),
        ("best_of_group", _best, _BEST),
    )
    for name, (make, options) in table.items()
    for ragged in (False, True)
]
