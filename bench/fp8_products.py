"""grouped_gemm of FP8 operands: each product of the experts, forward and for the gradient of the rows, against the same
product in bfloat16 and other people's; fp8_wgrads.py has the gradients of the weights.

The operands in bfloat16 are what the FP8 ones stand for, exactly: everybody computes the same. Weights are quantised
once in a step of training, so their cast is not counted; that of the rows is counted in "ours", and left out of
"ours, rows quantised".
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

import grpo_kernels
from grpo_kernels.fp8_quantize import ScaledTensor

from . import fp8_product_peers as peers
from . import fp8_wgrads, limits
from . import moe_definitions as definitions
from .case import Case, Inputs, Provider
from .moe_definitions import DEEPSEEK, GPT_OSS_SMALL, QWEN, Model, Values
from .target import Rows, Target, figure


@dataclass(frozen=True)
class Product:
    """Which product of a model's experts: the second or the first (`down`), forward or the gradient of its rows."""

    model: Model
    down: bool
    backward: bool
    rows: int  # of an expert

    @property
    def shape(self) -> tuple[int, int]:
        """(columns, width): the result's and the rows'."""
        columns, width = weight_shape(self.model, self.down)
        return (width, columns) if self.backward else (columns, width)

    def smoke(self) -> Product:
        return replace(self, model=definitions.tiny(self.model), rows=2)


def weight_shape(model: Model, down: bool) -> tuple[int, int]:
    """(N, K) of an expert's second or first weight."""
    return (model.hidden, model.width) if down else (2 * model.width, model.hidden)


def _make(product: Product, dtype: torch.dtype, device: str, size: str) -> Inputs:
    """Segments of equal sizes, as DeepGEMM needs them. The backward takes the transposed copy of the weights, and in
    bfloat16 a view.
    """
    product = product if size == "full" else product.smoke()
    experts, width = product.model.experts, product.shape[1]
    rows = grpo_kernels.fp8_quantize(torch.randn(experts * product.rows, width, device=device, dtype=dtype))
    normal = torch.randn(experts, *weight_shape(product.model, product.down), device=device, dtype=dtype)
    plain, turned = grpo_kernels.fp8_quantize(normal, (128, 128), transpose="both")
    wide = grpo_kernels.fp8_dequantize(plain, dtype)
    sizes = torch.full((experts,), product.rows, device=device)
    made = {"x": grpo_kernels.fp8_dequantize(rows, dtype), "data": rows.data, "scale": rows.scale}
    weight = turned if product.backward else plain
    made |= {"weight_data": weight.data, "weight_scale": weight.scale}
    made["weight"] = wide.transpose(1, 2) if product.backward else wide
    return made | {"offsets": sizes.cumsum(0).int(), "sizes": sizes}


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


def _against_bfloat16(rows: Rows) -> float | None:
    ours, other = (rows[name].get("median_us") if name in rows else None for name in ("ours", "F.grouped_mm"))
    return None if ours is None or other is None else other / ours


def _case(device: str, product: Product, dtype: torch.dtype, *, first: bool = False) -> Case:
    others = {
        "F.grouped_mm": _grouped_mm if hasattr(F, "grouped_mm") else None,
        "F.scaled_mm in a loop": peers.scaled_mm_loop(device),
        "DeepGEMM": peers.deep_gemm(device),
        "torchao": peers.torchao(device),
    }
    (columns, width), experts = product.shape, product.model.experts
    rows, limit = experts * product.rows, limits.fp8_limit(device, dtype)
    targets = (
        Target(">= 800 TFLOP/s", 800.0, figure("teraflops", "ours, rows quantised")),
        Target(">= 1.3x F.grouped_mm in bf16, casts included", 1.3, _against_bfloat16),
    )
    part = "dgrad" if product.backward else "fwd"
    return Case(
        op="grouped_gemm",
        name=f"{product.model.name} E={experts} {rows}x{width}x{columns} float8_e4m3fn {part}",
        make=partial(_make, product, dtype),
        providers=(
            Provider("ours", _ours, "ours"),
            Provider("ours, rows quantised", _ours_quantised, "ours"),
            Provider("eager", _eager, "eager"),
            *(Provider(name, run, "peer") for name, run in others.items() if run),
        ),
        operations=2 * rows * columns * width,
        matmul_dtype=limit,
        beside_bfloat16=limit == torch.float8_e4m3fn,
        targets=targets if device == "cuda" and first else (),
        definition=lambda inputs: definitions.sample(_eager(inputs)),
        sample_outputs=definitions.sample,
        quick=first,
        absent=tuple(name for name, run in others.items() if run is None),
    )


def cases(device: str) -> list[Case]:
    """Both products of one rank's experts of DeepSeek-V3 and of those of the others, their forward, the gradient of
    their rows and that of their weights; on a CPU thinner ones, and of one model alone all three.
    """
    if device == "cuda":
        of = ((DEEPSEEK.fewer(32), 4096), (DEEPSEEK.fewer(8), 1024), (QWEN, 256), (GPT_OSS_SMALL, 512))
        products = [
            Product(model, down, backward, rows)
            for model, rows in of
            for backward in (False, True)
            for down in (False, True)
        ]
        dtype, quick = torch.bfloat16, products[0]
        weights = [(model, down, rows) for model, rows in of for down in (False, True)]
    else:
        quick = Product(DEEPSEEK.fewer(32).thinner(8), False, False, 256)
        others = (QWEN.thinner(4), 16), (GPT_OSS_SMALL.thinner(8), 32)
        products = [quick, replace(quick, backward=True)]
        products += [Product(model, False, False, rows) for model, rows in others]
        dtype, weights = torch.float32, [(quick.model, False, quick.rows)]
    found = [_case(device, product, dtype, first=product == quick) for product in products]
    return found + [
        fp8_wgrads.case(device, model, weight_shape(model, down), rows, dtype) for model, down, rows in weights
    ]
