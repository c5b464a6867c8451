"""grouped_gemm of FP8 operands, one product of the experts, against the same product in bfloat16 and other people's.

The operands in bfloat16 are what the FP8 ones stand for, exactly: everybody computes the same. Weights are quantised
once in a step of training, so their cast is not counted; that of the rows is counted in "ours", and left out of
"ours, rows quantised".
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import grpo_kernels
from grpo_kernels.fp8_quantize import ScaledTensor

from . import fp8_product_peers as peers
from . import moe_definitions as definitions
from .case import Case, Inputs, Provider, Rows, Target
from .moe_definitions import DEEPSEEK, GPT_OSS_SMALL, QWEN, Model, Values


def _make(model: Model, down: bool, rows: int, dtype: torch.dtype, device: str, size: str) -> Inputs:
    """Segments of equal sizes, as DeepGEMM needs them."""
    model, rows = (model, rows) if size == "full" else (definitions.tiny(model), 2)
    columns, width = _shape(model, down)

    def quantized(block: tuple[int, int], *shape: int) -> tuple[Tensor, Tensor, Tensor]:
        scaled = grpo_kernels.fp8_quantize(torch.randn(shape, device=device, dtype=dtype), block)
        return *scaled, grpo_kernels.fp8_dequantize(scaled, dtype)

    names = ("data", "scale", "x", "weight_data", "weight_scale", "weight")
    sizes = torch.full((model.experts,), rows, device=device)
    values = quantized((1, 128), model.experts * rows, width) + quantized((128, 128), model.experts, columns, width)
    made = dict(zip(names, values, strict=True))
    return {"x": made.pop("x"), **made, "offsets": sizes.cumsum(0).int(), "sizes": sizes}


def _shape(model: Model, down: bool) -> tuple[int, int]:
    """(columns, width) of the second or of the first product."""
    return (model.hidden, model.width) if down else (2 * model.width, model.hidden)


def _multiply(x: ScaledTensor, inputs: Inputs) -> Values:
    weight = ScaledTensor(inputs["weight_data"], inputs["weight_scale"])
    return (grpo_kernels.grouped_gemm(x, weight, inputs["offsets"], out_dtype=inputs["x"].dtype),)


def _ours(inputs: Inputs) -> Values:
    return _multiply(grpo_kernels.fp8_quantize(inputs["x"]), inputs)


def _ours_quantised(inputs: Inputs) -> Values:
    return _multiply(ScaledTensor(inputs["data"], inputs["scale"]), inputs)


def _eager(inputs: Inputs) -> Values:
    """The experts in turn; their sizes have to be known on the host."""
    parts = inputs["x"].split(inputs["sizes"].tolist())
    return (torch.cat([F.linear(*pair) for pair in zip(parts, inputs["weight"].unbind(), strict=True)]),)


def _grouped_mm(inputs: Inputs) -> Values:
    return (F.grouped_mm(inputs["x"], inputs["weight"].transpose(1, 2), offs=inputs["offsets"]),)


def _teraflops(rows: Rows) -> float | None:
    return rows["ours, rows quantised"].get("teraflops")


def _against_bfloat16(rows: Rows) -> float | None:
    ours, other = (rows[name].get("median_us") if name in rows else None for name in ("ours", "F.grouped_mm"))
    return None if ours is None or other is None else other / ours


def _case(device: str, model: Model, down: bool, rows: int, dtype: torch.dtype, *, first: bool = False) -> Case:
    others = {
        "F.grouped_mm": _grouped_mm if hasattr(F, "grouped_mm") else None,
        "F.scaled_mm in a loop": peers.scaled_mm_loop(device),
        "DeepGEMM": peers.deep_gemm(device),
        "torchao": peers.torchao(device),
    }
    columns, width = _shape(model, down)
    targets = (
        Target(">= 800 TFLOP/s", 800.0, _teraflops),
        Target(">= 1.3x F.grouped_mm in bf16, casts included", 1.3, _against_bfloat16),
    )
    return Case(
        op="grouped_gemm",
        name=f"{model.name} E={model.experts} {model.experts * rows}x{width}x{columns} float8_e4m3fn fwd",
        make=partial(_make, model, down, rows, dtype),
        providers=(
            Provider("ours", _ours, "ours"),
            Provider("ours, rows quantised", _ours_quantised, "ours"),
            Provider("eager", _eager, "eager"),
            *(Provider(name, run, "peer") for name, run in others.items() if run),
        ),
        operations=2 * model.experts * rows * columns * width,
        matmul_dtype=torch.float8_e4m3fn if device == "cuda" else dtype,
        targets=targets if device == "cuda" and first else (),
        definition=lambda inputs: definitions.sample(_eager(inputs)),
        sample_outputs=definitions.sample,
        quick=first,
        absent=tuple(name for name, run in others.items() if run is None),
    )


def cases(device: str) -> list[Case]:
    """Both products of one rank's experts of DeepSeek-V3 and of those of the others; thinner ones on a CPU."""
    if device == "cuda":
        of = ((DEEPSEEK.fewer(32), 4096), (DEEPSEEK.fewer(8), 1024), (QWEN, 256), (GPT_OSS_SMALL, 512))
        return [
            _case(device, model, down, rows, torch.bfloat16, first=not down and model.experts == 8)
            for model, rows in of
            for down in (False, True)
        ]
    thin = (DEEPSEEK.fewer(32).thinner(8), 256), (QWEN.thinner(4), 16), (GPT_OSS_SMALL.thinner(8), 32)
    return [_case(device, model, False, rows, torch.float32, first=model.experts == 8) for model, rows in thin]
