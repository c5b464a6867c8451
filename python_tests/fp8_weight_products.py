"""What the tests of the cache of FP8 weights share: a product that asks it in both passes, and a count."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grpo_kernels import ScaledTensor, _extension, fp8_dequantize
from grpo_kernels.moe_experts import fp8_weights
from grpo_kernels.moe_experts.fp8_weights import clear_fp8_weight_cache
from python_tests.fp8_problems import bits

BACKEND = "reference" if _extension.cpu_problem() else "native"
E, N, K = 2, 150, 140
BOTH, PLAIN, TURNED = (True, True), (True, False), (False, True)
Made = list[tuple[bool, bool]]


def wide(scaled: ScaledTensor) -> Tensor:
    return fp8_dequantize(scaled, torch.float32)


def same(one: ScaledTensor, other: ScaledTensor) -> bool:
    return torch.equal(bits(one.data), bits(other.data)) and torch.equal(one.scale, other.scale)


def quantized(weight: Tensor, backend: str = BACKEND, both: bool = True) -> ScaledTensor:
    """The copy for the forward."""
    return fp8_weights.quantized(weight, backend, both=both)


def turned(weight: Tensor, backend: str = BACKEND) -> ScaledTensor:
    """The transposed one, of the very weight."""
    return fp8_weights.turned(weight, backend)


class Product(torch.autograd.Function):
    """x [E, M, K] times each expert's weight, transposed: with its FP8 copy, and with the turned one for grad x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.saved = fp8_weights.reference_to(weight)
        return x @ wide(fp8_weights.quantized(weight, BACKEND, both=True)).mT

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ wide(fp8_weights.turned(weight, BACKEND, ctx.saved)).mT, grad.mT @ x


class Layer(nn.Module):
    """One such product."""

    def __init__(self, rows: int = N, columns: int = K) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, rows, columns))

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return x @ wide(quantized(self.weight, both=False)).mT
        result: Tensor = Product.apply(x, self.weight)  # type: ignore[no-untyped-call]
        return result


def count_quantisations(monkeypatch: pytest.MonkeyPatch) -> Made:
    """A list that grows with every quantisation: was the plain copy made, and the turned one?"""
    made: Made = []
    quantize = fp8_weights._quantize

    def counting(weight: Tensor, backend: str, rows: bool, columns: bool) -> Any:
        made.append((rows, columns))
        return quantize(weight, backend, rows, columns)

    monkeypatch.setattr(fp8_weights, "_quantize", counting)
    return made


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    return count_quantisations(monkeypatch)


@pytest.fixture(autouse=True)
def nothing_is_kept() -> Iterator[None]:
    clear_fp8_weight_cache()
    yield
    clear_fp8_weight_cache()
