"""The Triton kernels of fp8_quantize, run by Triton's interpreter on CPU tensors: the definition's bits.

The interpreter's own conversion to FP8 is wrong, so that the kernels compute codes with integers here, as on devices
without FP8; python_tests/gpu/test_fp8_quantize.py compares the two. It truncates float32 to bfloat16 where a GPU rounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from grpo_kernels import ScaledTensor, fp8_dequantize, fp8_quantize
from grpo_kernels.fp8_quantize import ops, reference
from grpo_kernels.testing import guard_input, guarded_allocations, poisoned_allocations

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("triton_on_cpu")]

BLOCKS = [(1, 128), (128, 128)]
SCALES = pytest.mark.parametrize("power_of_two", [True, False], ids=["powers of two", "plain"])


def assert_same(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Shapes, strides, and all bits: one NaN of a kind."""
    for a, b in zip(actual, expected, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
        raw = torch.uint8 if a.element_size() == 1 else torch.int32
        assert torch.equal(a.view(raw), b.view(raw))


def values(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Numbers of many magnitudes with zeros of both signs, a zero row, an infinity and a NaN."""
    x = torch.randn(*shape) * torch.exp(3 * torch.randn(*shape))
    flat = x.view(-1)
    flat[::13] = 0.0
    flat[5::17] = -0.0
    x[..., :1, :] = 0.0
    if flat.numel() > 400:
        flat[399], flat[flat.numel() // 2] = math.nan, -math.inf
    return x.to(dtype)


@pytest.mark.parametrize("shape", [(1, 1), (3, 130), (2, 129, 40)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@SCALES
def test_every_form_has_the_bits_of_the_definition(power_of_two: bool, dtype: torch.dtype, shape: tuple[int]) -> None:
    x = values(shape, dtype)
    for square in (False, True):
        for rows, columns in ((True, False), (False, True), (True, True)):
            arguments = (x, square, power_of_two, rows, columns, 1e-12)
            assert_same(ops.fp8_quantize(*arguments, "triton"), reference.fp8_quantize(*arguments))


def test_encoding_of_every_bfloat16() -> None:
    """Next to 448 the scale is 1: what remains is the encoding. PyTorch's cast is right up to there."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = every[every.abs() <= 448]
    every = torch.cat([every, every.new_zeros(-len(every) % 127)]).view(-1, 127)
    data, scale = fp8_quantize(torch.cat([torch.full((len(every), 1), 448.0).bfloat16(), every], 1))
    assert torch.equal(scale, torch.ones_like(scale))
    assert torch.equal(data[:, 1:].view(torch.uint8), every.to(torch.float8_e4m3fn).view(torch.uint8))


def test_ties_go_to_even() -> None:
    """Halfway between two codes, and the nearest numbers on both sides of that."""
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (codes[:-1] + codes[1:]) / 2
    tried = torch.stack([torch.nextafter(middle, codes[:-1]), middle, torch.nextafter(middle, codes[1:])])
    below = torch.arange(0x7E, dtype=torch.int32)
    expected = torch.stack([below, below + below % 2, below + 1])
    rows = torch.cat([torch.full((3, 1), 448.0), tried], 1)
    for sign, bit in ((1, 0), (-1, 0x80)):
        found = fp8_quantize(rows * sign).data[:, 1:].view(torch.uint8).int()
        assert torch.equal(found, expected | bit)


@SCALES
def test_scales_at_their_limits(power_of_two: bool) -> None:
    """Tiles of one magnitude each: around 448 * 2^k, the smallest and the largest numbers, below and at eps."""
    tops = [448.0 * 2.0**k for k in (-20, -1, 0, 5)]
    tops += [math.nextafter(top, math.inf) for top in tops] + [1.5 * top for top in tops]
    x = torch.tensor([*tops, 0.0, 1e-45, 1e-31, 3.3e38])[:, None].expand(-1, 128).contiguous()
    x[:, ::3] *= 0.01
    for eps in (1e-30, 1e-12, 1.0):
        arguments = (x, False, power_of_two, True, True, eps)
        assert_same(ops.fp8_quantize(*arguments, "triton"), reference.fp8_quantize(*arguments))


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_views_and_what_lies_around_them(block: tuple[int, int]) -> None:
    """Columns of a wider tensor, a transposed one, a batch that is spread out; nothing outside is read or written."""
    wide = torch.randn(3, 40, 200).bfloat16()
    for x in (wide[0, :, 16:176], wide[1, :, 3:100], wide[0].T, wide[::2, 5:, :130]):
        expected = [tensor for pair in fp8_quantize(x.contiguous(), block, transpose="both") for tensor in pair]
        with guarded_allocations(), poisoned_allocations():
            found = fp8_quantize(guard_input(x), block, transpose="both")
        assert_same([tensor for pair in found for tensor in pair], expected)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 3, 4), (2, 0, 4)], ids=str)
def test_nothing(shape: tuple[int, ...]) -> None:
    for block in BLOCKS:
        for scaled in fp8_quantize(torch.randn(shape), block, transpose="both"):
            assert scaled.data.numel() == 0
            assert fp8_dequantize(scaled).shape == scaled.data.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_every_code_and_back(dtype: torch.dtype) -> None:
    """The 254 numbers with the NaNs of both signs, in a tensor of its own and as a transposed view."""
    data = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).repeat(3, 1)
    scale = torch.tensor([[1.0, 0.375], [2.0**-9, math.nan], [1e-3, 100.0]])
    expected = reference.fp8_dequantize(data, scale, dtype)
    for scaled, wanted in ((ScaledTensor(data, scale), expected), (ScaledTensor(data.mT, scale.mT), expected.mT)):
        found = fp8_dequantize(scaled, dtype)
        assert torch.equal(found.isnan(), wanted.isnan())
        assert torch.equal(found.nan_to_num(7.0), wanted.nan_to_num(7.0))


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_there_and_back(block: tuple[int, int]) -> None:
    """Tiles of 128 rows, columns, both or neither; powers of two keep all bits in bfloat16, too."""
    x = torch.randn(2, 150, 20).bfloat16()
    for scaled in fp8_quantize(x, block, transpose="both"):
        turned = ScaledTensor(scaled.data.mT, scaled.scale.mT)
        for given in (scaled, turned):
            expected = reference.fp8_dequantize(*given, torch.bfloat16)
            with guarded_allocations(), poisoned_allocations():
                assert torch.equal(fp8_dequantize(ScaledTensor(*map(guard_input, given))), expected)


def test_launch_config_has_whole_tiles() -> None:
    from grpo_kernels.fp8_quantize._kernels_triton import launch_config

    assert launch_config(False, True, False) == (32, 128, 4)
    assert launch_config(False, False, True) == (128, 64, 4)
    assert launch_config(False, True, True) == launch_config(True, True, False) == (128, 128, 8)
    for square, rows, columns in ((a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1) if b or c):
        config = launch_config(bool(square), bool(rows), bool(columns))
        assert config.columns == 128 or not (square or rows)
        assert config.rows == 128 or not (square or columns)
        assert config.rows * config.columns // (32 * config.num_warps) in (32, 64)  # elements a thread
