"""Cases of fp8_quantize and fp8_dequantize. Codes and scales are compared as integers: every bit has to be right."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

import grpo_kernels
from grpo_kernels.testing.verification.case import BFLOAT16, EVERY_DTYPE, FLOAT32, Case, Inputs, Outputs

_ROWS, _SQUARE = (1, 128), (128, 128)
_NARROW = (FLOAT32, BFLOAT16)


def _wild(generator: torch.Generator, shape: tuple[int, ...], bad: bool = False) -> Inputs:
    """Numbers of many sizes, zeros of both signs, and if `bad` NaN and infinities in some tiles."""
    exponents = torch.randint(-12, 5, shape, generator=generator).float()
    x = torch.randn(shape, generator=generator) * torch.exp2(exponents)
    x[torch.rand(shape, generator=generator) < 0.02] = -0.0
    x[..., :1, :] = 0.0
    if bad:
        x[..., 3, 5], x[..., -1, -1], x[..., 40, -2] = math.nan, math.inf, -math.inf
    return {"x": x}


def _bits(scaled: grpo_kernels.ScaledTensor, name: str) -> Outputs:
    return {name + "codes": scaled.data.view(torch.uint8), name + "scale": scaled.scale.view(torch.int32)}


def _seen(value: Tensor, layout: str) -> Tensor:
    """The tensor itself, as some of the columns of a larger one, or as a transposed view."""
    if layout == "wide":
        return torch.nn.functional.pad(value, (3, 5))[..., 3:-5]
    return value.mT.contiguous().mT if layout == "turned" else value


def _run(inputs: Inputs, layout: str, transpose: Any, block: tuple[int, int], **options: Any) -> Outputs:
    found = grpo_kernels.fp8_quantize(_seen(inputs["x"], layout), block, transpose=transpose, **options)
    if transpose != "both":
        return _bits(found, "")
    return _bits(found[0], "") | _bits(found[1], "transpose's ")


def _case(
    name: str,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...] = EVERY_DTYPE,
    *,
    bad: bool = False,
    block: tuple[int, int] = _ROWS,
    transpose: Any = False,
    layout: str = "",
    **options: Any,
) -> Case:
    make = functools.partial(_wild, shape=shape, bad=bad)
    run = functools.partial(_run, layout=layout, transpose=transpose, block=block, **options)
    return Case("fp8_quantize", name, make, run, dtypes)


# --- back: the codes come from the definition, so that a fault of fp8_quantize shows in its own cases -----------------


def _make_scaled(generator: torch.Generator, shape: tuple[int, ...], options: dict[str, Any]) -> Inputs:
    with grpo_kernels.backend("reference"):
        data, scale = grpo_kernels.fp8_quantize(_wild(generator, shape, bad=True)["x"], **options)
    return {"codes": data.view(torch.uint8), "scale_bits": scale.view(torch.int32)}


def _run_back(inputs: Inputs, turned: bool) -> Outputs:
    data, scale = inputs["codes"].view(torch.float8_e4m3fn), inputs["scale_bits"].view(torch.float32)
    if turned:
        data, scale = data.mT, scale.mT
    results = {}
    for dtype, word in ((torch.float32, torch.int32), (torch.bfloat16, torch.int16), (torch.float16, torch.int16)):
        value = grpo_kernels.fp8_dequantize(grpo_kernels.ScaledTensor(data, scale), dtype)
        name = str(dtype).removeprefix("torch.")
        results[f"NaN in {name}"] = value.isnan()
        results[name] = torch.where(value.isnan(), 0.0, value).view(word)
    return results


def _back_case(name: str, shape: tuple[int, ...], turned: bool = False, **options: Any) -> Case:
    make = functools.partial(_make_scaled, shape=shape, options=options)
    return Case("fp8_dequantize", name, make, functools.partial(_run_back, turned=turned))


CASES = [
    _case("rows", (64, 384)),
    _case("rows, tails", (67, 300), bad=True),
    _case("rows of more columns", (45, 129), layout="wide", transpose="both"),
    _case("rows, any scale", (50, 260), bad=True, power_of_two_scales=False),
    _case("the transpose", (131, 140), bad=True, transpose=True),
    _case("both, of a transposed view", (257, 130), _NARROW, layout="turned", transpose="both"),
    _case("both, any scale", (130, 300), power_of_two_scales=False, transpose="both"),
    _case("square", (2, 130, 260), bad=True, block=_SQUARE),
    _case("square, both", (3, 128, 256), block=_SQUARE, transpose="both"),
    _case("square, both, any scale", (129, 200), block=_SQUARE, transpose="both", power_of_two_scales=False),
    _case("large eps", (41, 128), _NARROW, eps=0.25),
    _case("one number", (1, 1), _NARROW, transpose="both"),
    _case("no rows", (0, 128), _NARROW, transpose="both"),
    _case("no experts", (0, 128, 128), _NARROW, block=_SQUARE, transpose="both"),
    _back_case("rows", (67, 300)),
    _back_case("rows, any scale, transposed views", (2, 67, 130), turned=True, power_of_two_scales=False),
    _back_case("square", (2, 130, 260), block=_SQUARE),
]
