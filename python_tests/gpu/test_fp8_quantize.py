"""What a GPU's own conversion to FP8 gives, against the definition's integers: every bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import grpo_kernels
from python_tests.gpu.devices import DEVICES, assert_same_bits
from python_tests.gpu.fuzz.problems import random_bits
from python_tests.samples import tensors

ON_DEVICES = pytest.mark.parametrize("device", DEVICES)
SCALES = pytest.mark.parametrize("power_of_two", [True, False], ids=["powers of two", "plain"])


def _one_nan(found: Tensor) -> Tensor:
    """All bits, but for what a NaN in a scale may hold."""
    return found.cpu() if found.element_size() == 1 else found.cpu().masked_fill(found.cpu().isnan(), float("nan"))


def _assert_as_defined(x: Tensor, device: str, function: Callable[[Tensor], object]) -> None:
    with grpo_kernels.backend("reference"):
        expected = tensors(function(x))
    assert_same_bits([_one_nan(t) for t in tensors(function(x.to(device)))], [_one_nan(t) for t in expected])


def _every(dtype: torch.dtype) -> Tensor:
    """[N, 128]. All numbers of 16 bits, neighbours in one tile; then each beside 448: those below have scale 1."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = every[every.isfinite()]
    finite = torch.cat([finite, finite.new_zeros(-len(finite) % 127)]).view(-1, 127)
    return torch.cat([every.view(-1, 128), torch.cat([finite.new_full((len(finite), 1), 448.0), finite], 1)])


@ON_DEVICES
@SCALES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_of_sixteen_bits(dtype: torch.dtype, power_of_two: bool, device: str) -> None:
    _assert_as_defined(_every(dtype), device, lambda x: grpo_kernels.fp8_quantize(x, power_of_two_scales=power_of_two))


@ON_DEVICES
@SCALES
def test_ties_and_their_neighbours(power_of_two: bool, device: str) -> None:
    """Halfway between two codes in float32, the nearest numbers on both sides, and all of it times powers of two."""
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (codes[:-1] + codes[1:]) / 2
    tried = torch.stack([torch.nextafter(middle, codes[:-1]), middle, torch.nextafter(middle, codes[1:])])
    rows = torch.cat([torch.full((3, 2), 448.0), tried], 1)
    x = torch.cat([rows * 2.0**k for k in (-90, -30, -1, 0, 1, 30, 118)])
    _assert_as_defined(
        torch.cat([x, -x]), device, lambda x: grpo_kernels.fp8_quantize(x, power_of_two_scales=power_of_two, eps=1e-30)
    )


@ON_DEVICES
@SCALES
@pytest.mark.parametrize("spread", [3, 24, 240])
def test_random_bits_of_float32(spread: int, power_of_two: bool, device: str) -> None:
    """Of all signs and mantissas; a row's exponents lie within so many powers of two of each other."""
    x = random_bits(512, 384, spread)
    _assert_as_defined(x, device, lambda x: grpo_kernels.fp8_quantize(x, power_of_two_scales=power_of_two, eps=1e-30))


@ON_DEVICES
@SCALES
@pytest.mark.parametrize("block", [(1, 128), (128, 128)], ids=str)
def test_matrices(block: tuple[int, int], power_of_two: bool, device: str) -> None:
    """Rows that are aligned and others, tails of both axes, experts; zeros, NaN and infinities among the values."""
    for shape in ((700, 2880), (3, 130, 257), (256, 512)):
        x = torch.randn(shape) * torch.exp(4 * torch.randn(shape))
        flat = x.view(-1)
        flat[::11], flat[flat.numel() // 3], flat[flat.numel() // 2] = 0.0, float("nan"), float("-inf")
        for values in (x, x.bfloat16(), x.half()):
            _assert_as_defined(
                values,
                device,
                lambda x: grpo_kernels.fp8_quantize(x, block, power_of_two_scales=power_of_two, transpose="both"),
            )


@ON_DEVICES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_code_and_back(dtype: torch.dtype, device: str) -> None:
    data = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).repeat(4, 1)
    scale = torch.tensor([[1.0, 0.375], [2.0**-9, float("nan")], [1e-3, 100.0], [2.0**-20, 3e35]])

    def back(device: str) -> Tensor:
        scaled = grpo_kernels.ScaledTensor(data.to(device), scale.to(device))
        return grpo_kernels.fp8_dequantize(scaled, dtype).cpu()

    with grpo_kernels.backend("reference"):
        expected = back("cpu")
    assert torch.equal(back(device).isnan(), expected.isnan())
    assert_same_bits([back(device).nan_to_num(7.0)], [expected.nan_to_num(7.0)])


@ON_DEVICES
@SCALES
@pytest.mark.parametrize("hidden", [1031, 2880])
def test_tokens_on_the_way_to_their_experts(hidden: int, power_of_two: bool, device: str) -> None:
    ids = torch.rand(150, 12).topk(4).indices
    ids[::7, 1] = -1
    x = torch.randn(150, hidden).bfloat16()
    x[5, 77] = float("nan")

    def move(x: Tensor) -> object:
        permutation = grpo_kernels.build_permutation(ids.to(x.device), 12, alignment=128)
        alone = grpo_kernels.moe_permute_quantize(x, permutation, power_of_two_scales=power_of_two)
        both = grpo_kernels.moe_permute_quantize(x, permutation, power_of_two_scales=power_of_two, transpose="both")
        return (alone, both)

    _assert_as_defined(x, device, move)
