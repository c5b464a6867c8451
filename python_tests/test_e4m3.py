"""The e4m3 format: what its codes mean, and which one a number gets, on every backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from grpo_kernels import ScaledTensor, fp8_dequantize, fp8_quantize
from grpo_kernels.fp8_quantize import reference

pytestmark = pytest.mark.usefixtures("backend")

NARROW = [torch.bfloat16, torch.float16]


def numbers() -> list[float]:
    """What the codes 0 to 0x7E stand for, from the format's definition: bias 7, three bits of mantissa."""
    return [
        (code & 7) * 2.0**-9 if code < 8 else (8 + (code & 7)) / 8 * 2.0 ** ((code >> 3) - 7) for code in range(0x7F)
    ]


def codes_of(values: Tensor) -> Tensor:
    """The codes of numbers up to 448, by tiles whose scale is 1: each begins with 448."""
    flat = values.reshape(-1)
    rows = -(-flat.numel() // 127)
    tiles = torch.zeros(rows, 128, dtype=values.dtype)
    tiles[:, 0] = 448.0
    tiles[:, 1:] = torch.nn.functional.pad(flat, (0, rows * 127 - flat.numel())).view(rows, 127)
    data, scale = fp8_quantize(tiles)
    assert torch.equal(scale, torch.ones(rows, 1))
    codes = data.view(torch.uint8)
    assert (codes[:, 0] == 0x7E).all()
    return codes[:, 1:].reshape(-1)[: flat.numel()]


def nearest(values: Tensor) -> Tensor:
    """The codes of the nearest numbers, the even one of two, looked for in the table; float64 holds all differences."""
    table = torch.tensor(numbers(), dtype=torch.float64)
    magnitude = values.double().abs()
    above = torch.searchsorted(table, magnitude).clamp(max=0x7E)
    below = (above - 1).clamp(min=0)
    left, right = magnitude - table[below], table[above] - magnitude
    code = torch.where((left < right) | ((left == right) & (below % 2 == 0)), below, above)
    return (code + 128 * values.signbit()).to(torch.uint8)


def every(dtype: torch.dtype) -> Tensor:
    """Every number of a 16-bit type."""
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_every_number_of_sixteen_bits(dtype: torch.dtype) -> None:
    """Against the table, and against PyTorch's cast, whose versions agree up to 448."""
    values = every(dtype)
    values = values[values.float().abs() <= 448]
    codes = codes_of(values)
    assert torch.equal(codes, nearest(values))
    assert torch.equal(codes, values.to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_boundary(dtype: torch.dtype) -> None:
    """Each number, the middle between each and the next, the float32 numbers beside those, and many others."""
    table = torch.tensor(numbers())
    middles = (table[1:] + table[:-1]) / 2
    marks = torch.cat([table, middles])
    values = torch.cat([marks, marks.nextafter(torch.tensor(0.0)), marks.nextafter(torch.tensor(448.0))])
    exponents = torch.randint(-30, 9, (50000,))
    values = torch.cat([values, (torch.rand(50000) + 1) * torch.exp2(exponents.float())]).clamp(max=448)
    values = torch.cat([values, -values]).to(dtype)
    assert torch.equal(codes_of(values), nearest(values))


def test_numbers_too_small_keep_their_sign() -> None:
    """Half of the smallest number is even's: zero. Subnormal floats are no exception."""
    values = torch.tensor([2.0**-10, 2.0**-10 * 1.001, 1e-30, 1e-44, 0.0])
    assert codes_of(torch.cat([values, -values])).tolist() == [0, 1, 0, 0, 0, 0x80, 0x81, 0x80, 0x80, 0x80]


def test_codes_mean_what_the_format_says() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        found = fp8_dequantize(ScaledTensor(codes.view(torch.float8_e4m3fn)[None], torch.ones(1, 2)), dtype)[0]
        expected = torch.tensor([*numbers(), float("nan"), *(-number for number in numbers()), float("nan")])
        torch.testing.assert_close(found, expected.to(dtype), rtol=0, atol=0, equal_nan=True)
        assert found.signbit()[:0x7F].count_nonzero() == 0
        assert found.signbit()[0x80:0xFF].all()


def test_beyond_the_largest_number() -> None:
    """The encoding saturates; only NaN is NaN. Kernels get there by a scale that was rounded, never by infinities."""
    values = torch.tensor([448.0, 464.0, 465.0, 1e5, 3e38, float("inf")])
    codes = reference.encode(torch.cat([values, -values, torch.tensor([float("nan"), -float("nan")])]))
    assert codes.tolist() == [0x7E] * 6 + [0xFE] * 6 + [0x7F] * 2
