"""The activation that quantises gives the codes of its parts: the activation in float32, then fp8_quantize."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from python_tests.gpu.devices import DEVICES, assert_same_bits, run_op

ON_DEVICES = pytest.mark.parametrize("device", DEVICES)
KINDS = pytest.mark.parametrize(
    "kind",
    [(False, 1.0, 1.0, False), (False, 1.0, 1.0, True), (True, 1.702, 1.5, False), (True, 1.702, 1.5, True)],
    ids=["swiglu", "interleaved", "clamped", "clamped, interleaved"],
)
WIDTHS = pytest.mark.parametrize("width", [128, 200])
ROWS, TOP_K = 300, 3


def _inputs(width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pre-activations, gradients, maps with padding, weights."""
    slots = torch.randperm(ROWS).int()
    slots[::9] = -1
    grad = torch.randn(ROWS, width) * torch.logspace(-6, 0, ROWS)[:, None]
    return torch.randn(ROWS, 2 * width) * 2, grad, slots, torch.rand(ROWS // TOP_K, TOP_K)


def _tiles(values: Tensor, eps: float, device: str) -> list[Tensor]:
    return run_op("fp8_quantize", (values, False, True, True, False, eps), device)[:2]


@ON_DEVICES
@WIDTHS
@KINDS
def test_forward(kind: tuple[bool, float, float, bool], width: int, device: str) -> None:
    preact, _, slots, _ = _inputs(width)
    activated = run_op("moe_glu", (preact, slots, None, *kind), device)[0]
    found = run_op("moe_glu_quantize", (preact, slots, *kind, True, 1e-12), device)
    kept = torch.where((slots >= 0)[:, None], preact, 0.0)
    assert_same_bits(found, [*_tiles(activated, 1e-12, device), *_tiles(kept, 1e-12, device)])


@ON_DEVICES
@WIDTHS
@KINDS
def test_backward(kind: tuple[bool, float, float, bool], width: int, device: str) -> None:
    values, grad, slots, weights = _inputs(width)
    data, scale = _tiles(torch.where((slots >= 0)[:, None], values, 0.0), 1e-12, device)
    preact = run_op("fp8_dequantize", (data, scale, torch.float32), device)[0]
    of_preact, activated, of_weights = run_op(
        "moe_glu_backward", (preact, grad, slots, weights, None, *kind, True, True, True), device
    )
    arguments = (data, scale, grad, slots, weights, None, *kind, *(True,) * 6, 1e-12, 1e-30, torch.bfloat16)
    *found, of_weights_found = run_op("moe_glu_backward_quantize", arguments, device)
    assert_same_bits(
        found,
        [
            *_tiles(of_preact, 1e-30, device),
            *_tiles(of_preact.t().contiguous(), 1e-30, device),
            of_preact.bfloat16(),
            *_tiles(activated.t().contiguous(), 1e-12, device),
            activated.bfloat16(),
        ],
    )
    size = (grad * activated / weights.flatten()[slots.clamp(min=0).long(), None]).abs().sum(1).max().item()
    torch.testing.assert_close(of_weights_found, of_weights, rtol=0.0, atol=2 * width * 2.0**-23 * size)
