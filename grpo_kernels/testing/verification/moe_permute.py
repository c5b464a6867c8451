"""Cases of build_permutation, moe_permute, moe_permute_quantize and moe_unpermute."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import grpo_kernels
from grpo_kernels.testing.verification.case import (
    BFLOAT16,
    EVERY_DTYPE,
    FLOAT32,
    FLOAT64,
    ROWS,
    Case,
    Inputs,
    Outputs,
    gradients,
    leaf,
)

_TRAINING = (FLOAT32, BFLOAT16, FLOAT64)
_EXPERTS = 12
Ids = Callable[[torch.Generator], Tensor]


def _uneven(generator: torch.Generator, tokens: int = 61, experts: int = _EXPERTS, top_k: int = 4) -> Tensor:
    """Different experts for the slots of a token, some experts far better liked, some not at all."""
    liking = torch.rand(tokens, experts, generator=generator) + torch.linspace(0, 1.2, experts)
    return liking.argsort(1)[:, -top_k:].int()


def _holes(generator: torch.Generator) -> Tensor:
    """Slots and whole tokens without an expert."""
    ids = _uneven(generator).long()
    ids[torch.rand(ids.shape, generator=generator) < 0.3] = -1
    ids[::7] = -5
    return ids


def _repeated(generator: torch.Generator) -> Tensor:
    return torch.randint(_EXPERTS, (50, 4), generator=generator)


def _one_expert(generator: torch.Generator) -> Tensor:
    return torch.full((300, 2), 7)


_NONE = functools.partial(_uneven, tokens=0)
_SINGLE = functools.partial(_uneven, tokens=1)
_MANY = functools.partial(_uneven, tokens=700, experts=1024, top_k=8)
_CHOICES: dict[str, tuple[Ids, dict[str, Any]]] = {
    "uneven": (_uneven, {}),
    "aligned": (_uneven, {"alignment": 8}),
    "holes": (_holes, {"alignment": 4}),
    "one rank's experts": (_holes, {"expert_range": (3, 9), "alignment": 2}),
    "experts repeated": (_repeated, {}),
    "one expert": (_one_expert, {"alignment": 16}),
    "one token": (_SINGLE, {"alignment": 128}),
    "no tokens": (_NONE, {"alignment": 8}),
}


def _make_ids(generator: torch.Generator, ids: Ids) -> Inputs:
    return {"topk_ids": ids(generator)}


def _run_map(inputs: Inputs, experts: int, options: dict[str, Any]) -> Outputs:
    return grpo_kernels.build_permutation(inputs["topk_ids"], experts, **options)._asdict()


# --- moves: the map comes from the definition, so that a fault of it shows in its own cases ---------------------------


def _make_rows(generator: torch.Generator, ids: Ids, options: dict[str, Any], width: int, back: bool) -> Inputs:
    chosen = ids(generator)
    with grpo_kernels.backend("reference"):
        made: Inputs = grpo_kernels.build_permutation(chosen, _EXPERTS, **options)._asdict()
    if not back:
        return made | {"x": torch.randn(len(chosen), width, generator=generator)}
    y = torch.randn(len(made["inv_map"]), width, generator=generator)
    y[made["inv_map"] < 0] = math.nan  # padding is never read
    weights = torch.rand(chosen.shape, generator=generator)
    weights[made["row_id_map"] < 0] = math.nan
    return made | {"y": y, "weights": weights}


def _seen(value: Tensor, wide: bool) -> Tensor:
    """The tensor itself, or as some of the columns of a larger one."""
    return torch.nn.functional.pad(value, (3, 5))[:, 3:-5] if wide else value


def _permutation(inputs: Inputs) -> grpo_kernels.Permutation:
    return grpo_kernels.Permutation(*(inputs[name] for name in grpo_kernels.Permutation._fields))


def _run_permute(inputs: Inputs, wide: bool) -> Outputs:
    x = leaf(inputs["x"])
    return gradients({ROWS + "x": grpo_kernels.moe_permute(_seen(x, wide), _permutation(inputs))}, {"x": x})


def _run_unpermute(inputs: Inputs, wide: bool, leaves: tuple[str, ...]) -> Outputs:
    given = {name: leaf(inputs[name]) if name in leaves else inputs[name] for name in ("y", "weights")}
    y = _seen(given["y"], wide)
    out = grpo_kernels.moe_unpermute(y, _permutation(inputs), given["weights"] if "weights" in leaves else None)
    return gradients({ROWS + "tokens": out}, {name: given[name] for name in leaves})


def _moves(name: str, dtypes: tuple[torch.dtype, ...], width: int = 40, wide: bool = False) -> list[Case]:
    ids, options = _CHOICES[name]
    make = functools.partial(_make_rows, ids=ids, options=options, width=width)
    label = f"{name}, H={width}" + (" of more columns" if wide else "")
    permuted = functools.partial(_run_permute, wide=wide)
    weighted = functools.partial(_run_unpermute, wide=wide, leaves=("y", "weights"))
    plain = functools.partial(_run_unpermute, wide=wide, leaves=("y",))
    return [
        Case("moe_permute", label, functools.partial(make, back=False), permuted, dtypes),
        Case("moe_unpermute", label, functools.partial(make, back=True), weighted, dtypes),
        Case("moe_unpermute", f"{label}, without weights", functools.partial(make, back=True), plain, _TRAINING),
    ]


def _run_quantize(inputs: Inputs, wide: bool, both: bool, power_of_two: bool) -> Outputs:
    """Codes as integers, which must be equal."""
    x, permutation = _seen(inputs["x"], wide), _permutation(inputs)
    found = {"rows": grpo_kernels.moe_permute_quantize(x, permutation, power_of_two_scales=power_of_two)}
    if both:
        found["rows of both"], found["transpose"] = grpo_kernels.moe_permute_quantize(
            x, permutation, power_of_two_scales=power_of_two, transpose="both"
        )
    codes = {f"codes of the {name}": scaled.data.view(torch.uint8) for name, scaled in found.items()}
    return codes | {f"scales of the {name}": scaled.scale for name, scaled in found.items()}


def _quantized(name: str, width: int, wide: bool = False) -> list[Case]:
    """With the transpose where the segments are wide enough."""
    ids, options = _CHOICES[name]
    make = functools.partial(_make_rows, ids=ids, options=options, width=width, back=False)
    run = functools.partial(_run_quantize, wide=wide, both=options.get("alignment") == 128)
    label = f"{name}, H={width}" + (" of more columns" if wide else "")
    return [
        Case("moe_permute_quantize", f"{label}, {kind}", make, functools.partial(run, power_of_two=power), EVERY_DTYPE)
        for kind, power in (("powers of two", True), ("plain scales", False))
    ]


CASES = [
    *(
        Case("build_permutation", name, functools.partial(_make_ids, ids=ids),
             functools.partial(_run_map, experts=_EXPERTS, options=options))
        for name, (ids, options) in _CHOICES.items()
    ),
    Case("build_permutation", "many experts", functools.partial(_make_ids, ids=_MANY),
         functools.partial(_run_map, experts=1024, options={"alignment": 4})),
    *_moves("uneven", EVERY_DTYPE),
    *_moves("aligned", _TRAINING, width=1),
    *_moves("holes", EVERY_DTYPE, width=133, wide=True),
    *_moves("one rank's experts", EVERY_DTYPE, width=257),
    *_moves("experts repeated", _TRAINING, width=64, wide=True),
    *_moves("one expert", _TRAINING),
    *_moves("one token", _TRAINING),
    *_moves("no tokens", _TRAINING),
    *_quantized("holes", 133, wide=True),
    *_quantized("one rank's experts", 272),
    *_quantized("one token", 24),
    *_quantized("no tokens", 40),
]  # fmt: skip
