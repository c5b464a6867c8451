"""Cases of grouped_gemm."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import grpo_kernels
from grpo_kernels import _dispatch
from grpo_kernels.testing.verification.case import (
    BFLOAT16,
    EVERY_DTYPE,
    FLOAT16,
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
_UNEVEN = (0, 5, 5, 5, 38, 39, 64)
"""Rows behind each expert: some have none, the last ends before the rows do."""


def _make(
    generator: torch.Generator, ends: Sequence[int], rows: int, width: int, columns: int, transposed: bool, bias: bool
) -> Inputs:
    """Behind the last segment the rows hold NaN."""
    experts = len(ends)
    shape = (experts, width, columns) if transposed else (experts, columns, width)
    made: Inputs = {
        "x": torch.randn(rows, width, generator=generator),
        "weight": torch.randn(shape, generator=generator) * width**-0.5,
        "offsets": torch.tensor(ends, dtype=torch.int32),
    }
    made["x"][ends[-1] :] = math.nan
    if bias:
        made["bias"] = torch.randn(experts, columns, generator=generator)
    return made


def _product(inputs: Inputs, transposed: bool, options: dict[str, Any]) -> Tensor:
    weight = inputs["weight"].transpose(1, 2) if transposed else inputs["weight"]
    given = {"bias": inputs["bias"]} if "bias" in inputs else {}
    return grpo_kernels.grouped_gemm(inputs["x"], weight, inputs["offsets"], **given, **options)


def _run(inputs: Inputs, transposed: bool, frozen: tuple[str, ...], options: dict[str, Any]) -> Outputs:
    names: list[str] = [name for name in ("x", "weight", "bias") if name in inputs and name not in frozen]
    leaves = {name: leaf(inputs[name]) for name in names}
    given = {} if inputs["x"].dtype == FLOAT64 else options  # float64 stays float64
    out = _product({**inputs, **leaves}, transposed, given)
    return gradients({"products" if "out_dtype" in options else ROWS + "products": out}, leaves)


def _run_accumulated(inputs: Inputs, transposed: bool, frozen: tuple[str, ...], options: dict[str, Any]) -> Outputs:
    """The weight's gradient through an accumulator that is not empty at the start; the definition has none."""
    leaves = {name: leaf(inputs[name]) for name in ("x", "weight")}
    exact = FLOAT64 if inputs["x"].dtype == FLOAT64 else FLOAT32
    size, device = inputs["weight"].numel(), inputs["x"].device
    total = torch.linspace(-1.0, 1.0, size, device=device, dtype=exact).view(inputs["weight"].shape)
    if _dispatch.resolve("grouped_gemm", inputs["x"]) == "reference":
        result = gradients({ROWS + "products": _product({**inputs, **leaves}, False, {})}, leaves)
        total += result[GRADIENT + "weight"].to(exact)
    else:
        product = _product({**inputs, **leaves}, False, {"weight_grad_accumulator": total})
        result = gradients({ROWS + "products": product}, leaves)
    return {**result, GRADIENT + "weight": total.to(inputs["weight"].dtype)}


def _run_fp8(inputs: Inputs, transposed: bool, frozen: tuple[str, ...], options: dict[str, Any]) -> Outputs:
    """Of operands that are quantised first; the tensor core's sums have fewer bits than float32, bfloat16 hides it."""
    x, weight = inputs["x"], inputs["weight"]
    scaled = grpo_kernels.fp8_quantize(x), grpo_kernels.fp8_quantize(weight, (128, 128), transpose=transposed)
    return {"products": grpo_kernels.grouped_gemm(*scaled, inputs["offsets"], bias=inputs.get("bias"), **options)}


def _case(
    name: str,
    dtypes: tuple[torch.dtype, ...] = _TRAINING,
    *,
    ends: Sequence[int] = _UNEVEN,
    rows: int = 70,
    width: int = 48,
    columns: int = 40,
    transposed: bool = False,
    bias: bool = False,
    frozen: tuple[str, ...] = (),
    run: Any = _run,
    **options: Any,
) -> Case:
    make = functools.partial(
        _make, ends=ends, rows=rows, width=width, columns=columns, transposed=transposed, bias=bias
    )
    runs = functools.partial(run, transposed=transposed, frozen=frozen, options=options)
    return Case("grouped_gemm", f"{name}, {rows}x{width}x{columns}", make, runs, dtypes)


CASES = [
    _case("uneven", EVERY_DTYPE),
    _case("bias", EVERY_DTYPE, bias=True),
    _case("weights [E, in, out]", transposed=True, bias=True),
    _case("ragged sizes", width=37, columns=19, bias=True),
    _case("tiles", ends=(130, 130, 300, 557), rows=560, width=136, columns=264),
    _case("accumulator", run=_run_accumulated),
    _case("wide results", (FLOAT32, BFLOAT16, FLOAT16), bias=True, out_dtype=FLOAT32),
    _case("frozen weight", bias=True, frozen=("weight", "bias")),
    _case("frozen rows", frozen=("x",)),
    _case("FP8", (FLOAT32, BFLOAT16), ends=(0, 5, 70, 300), rows=310, width=200, columns=136, run=_run_fp8),
    _case("FP8, transposed weights", (FLOAT32, BFLOAT16), transposed=True, bias=True, run=_run_fp8),
    _case("one expert", ends=(33,), rows=33),
    _case("all rows to one of many", ends=(0, 0, 65, 65), rows=65),
    _case("no rows of any expert", ends=(0, 0, 0), rows=6, bias=True),
    _case("no rows", ends=(0, 0), rows=0, bias=True),
]
