"""What the tests of fp8_quantize and fp8_dequantize share: inputs, and the definition as a loop over tiles."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from grpo_kernels import ScaledTensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ROWS, SQUARE = (1, 128), (128, 128)
BLOCKS = pytest.mark.parametrize("block", [ROWS, SQUARE], ids=["rows", "square"])
POWERS = pytest.mark.parametrize("power_of_two", [True, False], ids=["powers", "any_scale"])
NAN, INF = float("nan"), float("inf")
EPS = 1e-12


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8 if tensor.element_size() == 1 else torch.int32)


def tile_scale(amax: float, power_of_two: bool, eps: float) -> float:
    """The smallest power of two that will do, looked for; or a quotient of float32 numbers."""
    amax = max(amax, torch.tensor(eps, dtype=torch.float32).item())
    if not power_of_two:
        return (torch.tensor(amax) / torch.tensor(448.0)).item()
    exponent = math.frexp(amax / 448.0)[1] - 2
    while amax > 448.0 * 2.0**exponent:
        exponent += 1
    return 2.0**exponent


def definition(x: Tensor, block: tuple[int, int], power_of_two: bool, eps: float = EPS) -> ScaledTensor:
    """[M, K], one tile after the other, with PyTorch's own cast."""
    values = x.to(torch.float32)
    rows, width = values.shape
    data = torch.zeros(rows, width, dtype=torch.float8_e4m3fn)
    scale = torch.zeros(-(-rows // block[0]), -(-width // 128))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * 128, (j + 1) * 128))
            tile = values[part]
            if tile.isfinite().all():
                found = tile_scale(tile.abs().max().item(), power_of_two, eps)
                scale[i, j] = found
                data[part] = (tile / found).clamp(-448, 448).to(torch.float8_e4m3fn)
            else:
                scale[i, j] = NAN
                data[part] = torch.full_like(tile, NAN).to(torch.float8_e4m3fn)
    return ScaledTensor(data, scale)


def wild(*shape: int) -> Tensor:
    """float32 numbers of any size, few enough of each."""
    return torch.randn(*shape) * torch.exp2(torch.randint(-24, 13, shape).float())
