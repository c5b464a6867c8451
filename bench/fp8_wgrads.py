"""The gradient of the experts' weights of FP8 operands, against the same products in bfloat16 and other people's.

As in fp8_products.py the operands in bfloat16 are what the FP8 ones stand for. Both are quantised by tiles of 128 rows,
transposed: those casts are counted in "ours", and left out of "ours, operands quantised". In training they are part of
what gathers the rows, and of the activation's backward.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import grpo_kernels
from grpo_kernels import _dispatch
from grpo_kernels.fp8_quantize import ScaledTensor
from grpo_kernels.grouped_gemm import ops

from . import fp8_product_peers as peers
from . import limits
from . import moe_definitions as definitions
from .case import Case, Inputs, Provider
from .moe_definitions import Model, Values

_TILE = 128


def _make(model: Model, shape: tuple[int, int], rows: int, dtype: torch.dtype, device: str, size: str) -> Inputs:
    """Segments of equal sizes, multiples of 128."""
    if size != "full":
        model, shape, rows = definitions.tiny(model), (16, 24), _TILE
    made: Inputs = {}
    for name, width in zip(("grad", "x"), shape, strict=True):
        normal = torch.randn(model.experts * rows, width, device=device, dtype=dtype)
        scaled = grpo_kernels.fp8_quantize(normal, transpose=True)
        made[name] = grpo_kernels.fp8_dequantize(scaled, dtype).t().contiguous()
        made |= {f"{name}_data": scaled.data, f"{name}_scale": scaled.scale}
        if peers.deep_gemm_wgrad(device):  # which wants the codes of one expert behind those of the other
            experts = scaled.data.unflatten(1, (-1, rows)).transpose(0, 1)
            made[f"{name}_by_expert"] = experts.contiguous().flatten()
    sizes = torch.full((model.experts,), rows, device=device)
    return made | {"offsets": sizes.cumsum(0).int(), "sizes": sizes}


def _multiply(x: ScaledTensor, grad: ScaledTensor, inputs: Inputs) -> Values:
    backend = _dispatch.resolve("grouped_gemm", inputs["x"])
    found: Tensor = ops.fp8_grouped_gemm_wgrad(*x, *grad, inputs["offsets"], inputs["x"].dtype, backend)
    return (found,)


def _ours(inputs: Inputs) -> Values:
    x, grad = (grpo_kernels.fp8_quantize(inputs[name], transpose=True) for name in ("x", "grad"))
    return _multiply(x, grad, inputs)


def _ours_quantised(inputs: Inputs) -> Values:
    x, grad = (ScaledTensor(inputs[f"{name}_data"], inputs[f"{name}_scale"]) for name in ("x", "grad"))
    return _multiply(x, grad, inputs)


def _eager(inputs: Inputs) -> Values:
    """The experts in turn; their sizes have to be known on the host."""
    sizes = inputs["sizes"].tolist()
    pairs = zip(inputs["grad"].split(sizes), inputs["x"].split(sizes), strict=True)
    return (torch.stack([grad.t() @ x for grad, x in pairs]),)


def _grouped_mm(inputs: Inputs) -> Values:
    return (F.grouped_mm(inputs["grad"].t(), inputs["x"], offs=inputs["offsets"]),)


def case(device: str, model: Model, shape: tuple[int, int], rows: int, dtype: torch.dtype) -> Case:
    """The gradient of weights of this shape (N, K), of so many rows an expert."""
    others = {
        "F.grouped_mm": _grouped_mm if hasattr(F, "grouped_mm") else None,
        "F.scaled_mm in a loop": peers.scaled_mm_wgrad_loop(device),
        "DeepGEMM": peers.deep_gemm_wgrad(device),
    }
    columns, width = shape
    limit = limits.fp8_limit(device, dtype)
    return Case(
        op="grouped_gemm",
        name=f"{model.name} E={model.experts} {model.experts * rows}x{width}x{columns} float8_e4m3fn wgrad",
        make=partial(_make, model, shape, rows, dtype),
        providers=(
            Provider("ours", _ours, "ours"),
            Provider("ours, operands quantised", _ours_quantised, "ours"),
            Provider("eager", _eager, "eager"),
            *(Provider(name, run, "peer") for name, run in others.items() if run),
        ),
        operations=2 * model.experts * rows * columns * width,
        matmul_dtype=limit,
        beside_bfloat16=limit == torch.float8_e4m3fn,
        definition=lambda inputs: definitions.sample(_eager(inputs)),
        sample_outputs=definitions.sample,
        absent=tuple(name for name, run in others.items() if run is None),
    )
