"""Cases of moe_experts."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

import grpo_kernels
from grpo_kernels import _dispatch
from grpo_kernels.testing.verification.case import (
    BFLOAT16,
    EVERY_DTYPE,
    FLOAT32,
    FLOAT64,
    GRADIENT,
    ROWS,
    Case,
    Inputs,
    Outputs,
    gradients,
    leaf,
)

_TRAINING = (FLOAT32, BFLOAT16, FLOAT64)
_LEAVES = ("x", "gate_up", "down", "gate_up_bias", "down_bias", "weights")
_ACCUMULATED = ("gate_up", "down")
_BATCHES = 3  # of few tokens, so that the largest error is not one rounding


def _ids(generator: torch.Generator, routes: str, tokens: int, experts: int, top_k: int) -> Tensor:
    """Different experts for the slots of a token, the first expert's without any."""
    if routes == "one expert":
        return torch.full((tokens, 1), experts - 1)
    ids = 1 + torch.rand(tokens, experts - 1, generator=generator).argsort(1)[:, :top_k]
    if routes == "holes":
        ids[torch.rand(ids.shape, generator=generator) < 0.3] = -1
        ids[::6] = -1
    return ids.int()


def _make(
    generator: torch.Generator,
    tokens: int,
    total: int,
    held: int,
    hidden: int,
    width: int,
    routes: str,
    optional: str,
) -> Inputs:
    """`held` of `total` experts are here. `optional` names biases, also such as clearly exceed a limit, and parameters
    [E, in, out].
    """

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    ids = _ids(generator, routes, tokens, total, 3)
    made: Inputs = {
        "x": normal(tokens, hidden),
        "gate_up": normal(held, 2 * width, hidden, scale=2 * hidden**-0.5),
        "down": normal(held, hidden, width, scale=width**-0.5),
        "weights": torch.rand(ids.shape, generator=generator),
        "ids": ids,
    }
    if "transposed" in optional:
        made |= {name: made[name].transpose(1, 2).contiguous() for name in _ACCUMULATED}
    if "bias" in optional:
        made["gate_up_bias"], made["down_bias"] = normal(held, 2 * width), normal(held, hidden)
    if "limits" in optional:
        made["gate_up_bias"][:, ::6] += 16
        made["gate_up_bias"][:, 3::6] -= 16
    if routes == "holes":
        made["x"][::6] = math.nan  # of tokens without an expert
    return made


def _layer(inputs: Inputs, transposed: bool, options: dict[str, Any]) -> Tensor:
    up, down = (inputs[name].transpose(1, 2) if transposed else inputs[name] for name in _ACCUMULATED)
    biases = {name: inputs[name] for name in ("gate_up_bias", "down_bias") if name in inputs}
    return grpo_kernels.moe_experts(inputs["x"], up, down, (inputs["weights"], inputs["ids"]), **biases, **options)


def _run(inputs: Inputs, transposed: bool, frozen: tuple[str, ...], options: dict[str, Any]) -> Outputs:
    leaves = {name: leaf(inputs[name]) for name in _LEAVES if name in inputs and name not in frozen}
    return gradients({ROWS + "tokens": _layer({**inputs, **leaves}, transposed, options)}, leaves)


def _run_accumulated(inputs: Inputs, transposed: bool, frozen: tuple[str, ...], options: dict[str, Any]) -> Outputs:
    """Gradients of the parameters through accumulators that are not empty at the start; the definition has none."""
    leaves = {name: leaf(inputs[name]) for name in _LEAVES if name in inputs}
    exact = FLOAT64 if inputs["x"].dtype == FLOAT64 else FLOAT32
    totals = {}
    for name in _ACCUMULATED:
        begun = torch.linspace(-1.0, 1.0, inputs[name].numel(), device=inputs[name].device, dtype=exact)
        totals[name] = begun.view(inputs[name].shape)
    given = {**inputs, **leaves}
    if _dispatch.resolve("moe_experts", inputs["x"]) == "reference":
        result = gradients({ROWS + "tokens": _layer(given, False, options)}, leaves)
        for name, total in totals.items():
            total += result[GRADIENT + name].to(exact)
    else:
        accumulators = (totals["gate_up"], totals["down"])
        out = _layer(given, False, {**options, "weight_grad_accumulators": accumulators})
        result = gradients({ROWS + "tokens": out}, leaves)
    return result | {GRADIENT + name: total.to(inputs["x"].dtype) for name, total in totals.items()}


def _case(
    name: str,
    dtypes: tuple[torch.dtype, ...] = _TRAINING,
    *,
    tokens: int = 37,
    experts: int = 7,
    hidden: int = 40,
    width: int = 24,
    routes: str = "",
    optional: str = "",
    frozen: tuple[str, ...] = (),
    run: Any = _run,
    **options: Any,
) -> Case:
    first, last = options.get("expert_range", (0, experts))
    if "expert_range" in options:
        options["num_experts"] = experts
    make = functools.partial(
        _make, tokens=tokens, total=experts, held=last - first, hidden=hidden, width=width, routes=routes,
        optional=optional,
    )  # fmt: skip
    runs = functools.partial(run, transposed="transposed" in optional, frozen=frozen, options=options)
    return Case("moe_experts", f"{name}, H={hidden} I={width}", make, runs, dtypes, _BATCHES, rounds_between=True)


# No pre-activation is so near the limit that rounding could take it across.
_CLAMPED: dict[str, Any] = {"activation": "clamped_swiglu", "swiglu_limit": 6.65}

CASES = [
    _case("swiglu", EVERY_DTYPE),
    _case("swiglu, recomputed", EVERY_DTYPE, save="input"),
    _case("biases", optional="bias"),
    _case("gpt-oss", EVERY_DTYPE, optional="bias, limits, transposed", interleaved=True, **_CLAMPED),
    _case("gpt-oss, recomputed", optional="bias, limits, transposed", interleaved=True, save="input", **_CLAMPED),
    _case("clamped halves", optional="bias, limits", **_CLAMPED),
    _case("interleaved swiglu", interleaved=True),
    _case("holes", routes="holes", optional="bias"),
    _case("holes, aligned", routes="holes", alignment=8, save="input"),
    _case("one rank's experts", expert_range=(2, 5), alignment=4, optional="bias"),
    _case("ragged sizes", hidden=37, width=19, optional="bias"),
    _case("more rows than a tile", (FLOAT32, BFLOAT16), tokens=170, hidden=72, width=40),
    _case("accumulators", run=_run_accumulated),
    _case("frozen experts", frozen=("gate_up", "down", "gate_up_bias", "down_bias"), optional="bias"),
    _case("frozen tokens", frozen=("x", "weights"), save="input"),
    _case("all tokens to one expert", routes="one expert"),
    _case("one token", tokens=1),
    _case("no tokens", tokens=0, optional="bias"),
]
