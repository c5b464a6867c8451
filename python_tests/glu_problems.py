"""What the tests of the activation that quantises share: rows, calls between guard bands, and the composition."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from grpo_kernels.fp8_quantize import ops as fp8
from grpo_kernels.moe_experts import ops
from grpo_kernels.moe_experts.ops import QuantizedGradients, QuantizedNeeds
from grpo_kernels.testing import guard_input, guarded_allocations, poisoned_allocations

NAN, INF = float("nan"), float("inf")
EPS, GRAD_EPS = 1e-12, 1e-30
EVERYTHING = QuantizedNeeds(True, True, True, True, True, True)
ALONE = [QuantizedNeeds(*(name == field for name in QuantizedNeeds._fields)) for field in QuantizedNeeds._fields]
# clamped, alpha, limit, interleaved
SWIGLU, TURNED, CLAMPED, GPT_OSS = (
    (False, 1.0, 1.0, False),
    (False, 1.0, 1.0, True),
    (True, 1.3, 2.0, False),
    (True, 1.702, 7.0, True),
)
ACTIVATIONS = pytest.mark.parametrize("activation", [SWIGLU, TURNED, CLAMPED, GPT_OSS], ids=str)


class Problem(NamedTuple):
    """Rows with their slots. Those of padding hold NaN."""

    preact: Tensor
    grad: Tensor
    inv_map: Tensor
    weights: Tensor
    row_terms: Tensor

    @property
    def kept(self) -> tuple[Tensor, Tensor]:
        return tiles(self.preact, EPS)


def problem(rows: int, width: int, dtype: torch.dtype = torch.float32, padding: bool = True) -> Problem:
    weights = torch.rand(rows + 2, 2) + 0.1
    inv_map = torch.randperm(weights.numel())[:rows].int()
    preact, grad = 2 * torch.randn(rows, 2 * width), torch.randn(rows, width) * torch.exp(torch.randn(rows, 1))
    if padding:
        dead = torch.rand(rows) < 0.2
        inv_map[dead], preact[dead], grad[dead] = -1, NAN, NAN
    return Problem(preact.to(dtype), grad.to(dtype), inv_map, weights, torch.randn(rows))


def bits(tensor: Tensor) -> Tensor:
    if not tensor.dtype.is_floating_point:
        return tensor
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def assert_same(found: Any, expected: Any) -> None:
    """Shapes, strides, dtypes and bits; any NaN for a NaN."""
    names = getattr(found, "_fields", range(len(found)))
    for name, a, b in zip(names, found, expected, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype), name
        if a.element_size() > 1:
            a, b = torch.where(a.isnan(), NAN, a), torch.where(b.isnan(), NAN, b)
        assert torch.equal(bits(a), bits(b)), name


def tiles(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return fp8.fp8_quantize(x, False, True, True, False, eps, "native")[:2]


def turned_tiles(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return fp8.fp8_quantize(x, False, True, False, True, eps, "native")[2:]


def dequantised(data: Tensor, scale: Tensor) -> Tensor:
    return fp8.fp8_dequantize(data, scale, torch.float32, "native")


def forward(p: Problem, activation: Any, keep: bool = True, eps: float = EPS) -> tuple[Tensor, ...]:
    with guarded_allocations(), poisoned_allocations():
        return ops.moe_glu_quantize(guard_input(p.preact), guard_input(p.inv_map), *activation, keep, eps, "native")


def backward(
    p: Problem,
    activation: Any,
    needs: QuantizedNeeds = EVERYTHING,
    dtype: torch.dtype = torch.float32,
    kept: tuple[Tensor, Tensor] | None = None,
    with_grad: bool = True,
    with_terms: bool = True,
) -> QuantizedGradients:
    data, scale = p.kept if kept is None else kept
    with guarded_allocations(), poisoned_allocations():
        found = ops.moe_glu_backward_quantize(
            guard_input(data.view(torch.uint8)).view(data.dtype),
            guard_input(scale),
            guard_input(p.grad) if with_grad else None,
            guard_input(p.inv_map),
            guard_input(p.weights),
            guard_input(p.row_terms) if with_terms else None,
            *activation,
            *needs,
            EPS,
            GRAD_EPS,
            dtype,
            "native",
        )
    return QuantizedGradients(*found)


def composed_forward(p: Problem, activation: Any) -> tuple[Tensor, ...]:
    """moe_glu of float32, then fp8_quantize."""
    activated = ops.moe_glu(p.preact.float(), p.inv_map, None, *activation, "native")
    return *tiles(activated, EPS), *tiles(p.preact.float().where((p.inv_map >= 0)[:, None], 0.0), EPS)


def composed_backward(p: Problem, activation: Any, dtype: torch.dtype) -> QuantizedGradients:
    """fp8_dequantize and moe_glu_backward of float32, then fp8_quantize."""
    grad, activated, weights = ops.moe_glu_backward(
        dequantised(*p.kept), p.grad.float(), p.inv_map, p.weights, p.row_terms, *activation, True, True, True, "native"
    )
    return QuantizedGradients(
        *tiles(grad, GRAD_EPS),
        *turned_tiles(grad, GRAD_EPS),
        grad.to(dtype),
        *turned_tiles(activated, EPS),
        activated.to(dtype),
        weights,
    )
