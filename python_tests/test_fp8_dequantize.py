"""fp8_dequantize, and what a number loses on the way there and back."""

from __future__ import annotations

import pytest
import torch

from grpo_kernels import ScaledTensor, fp8_dequantize, fp8_quantize
from grpo_kernels.testing import poisoned_allocations
from python_tests.fp8_problems import BLOCKS, DTYPES, INF, NAN, POWERS, SQUARE, wild

pytestmark = pytest.mark.usefixtures("backend")


@BLOCKS
@POWERS
def test_the_error_is_half_a_step(power_of_two: bool, block: tuple[int, int]) -> None:
    """A sixteenth of a normal number, and half of 2^-9 scales below; the scale leaves no bit of the range unused."""
    x = wild(130, 2880)
    scaled = fp8_quantize(x, block, power_of_two_scales=power_of_two)
    scale = scaled.scale.double().repeat_interleave(128, 1)[:, :2880]
    scale = scale.repeat_interleave(128, 0)[:130] if block == SQUARE else scale
    error = (scaled.data.double() * scale - x.double()).abs()
    rounding = 1.0 if power_of_two else 1.0 + 2.0**-20  # of a quotient, which is then rounded again
    assert (error <= rounding * torch.maximum(x.double().abs() / 16, scale * 2.0**-10)).all()
    pad = torch.nn.functional.pad(scaled.data.float().abs(), (0, 64))
    largest = pad.view(130, 23, 128).amax(-1)
    largest = torch.stack([largest[:128].amax(0), largest[128:].amax(0)]) if block == SQUARE else largest
    assert (largest >= 224.0).all() if power_of_two else (largest == 448.0).all()


@BLOCKS
@pytest.mark.parametrize("shape", [(3, 300), (150, 260)], ids=str)
def test_a_second_time_changes_nothing(shape: tuple[int, int], block: tuple[int, int]) -> None:
    """With powers of two: dequantised numbers survive, with whatever scale their tile then gets."""
    first = fp8_quantize(wild(*shape), block)
    values = fp8_dequantize(first, torch.float32)
    again = fp8_quantize(values, block)
    assert torch.equal(fp8_dequantize(again, torch.float32), values)
    assert ((again.scale == first.scale) | (again.scale == first.scale / 2)).all()


def test_tiles_of_the_other_axis_change_nothing_but_subnormals() -> None:
    """What a backward does with saved activations: tiles along rows become tiles along columns."""
    values = fp8_dequantize(fp8_quantize(torch.randn(256, 384)), torch.float32)
    turned = fp8_quantize(values, transpose=True)
    normal = turned.data.float().abs() >= 2.0**-6
    assert normal.float().mean() > 0.9
    assert torch.equal(fp8_dequantize(turned, torch.float32)[normal], values.mT[normal])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@POWERS
@BLOCKS
def test_dequantised_numbers(block: tuple[int, int], power_of_two: bool, dtype: torch.dtype) -> None:
    """A float32 product, rounded; of transposed views and of slices as well."""
    x = wild(2, 140, 300)
    x[1, 3, 5] = NAN
    scaled = fp8_quantize(x, block, power_of_two_scales=power_of_two)
    scale = scaled.scale.repeat_interleave(128, 2)[..., :300]
    scale = scale.repeat_interleave(128, 1)[:, :140] if block == SQUARE else scale
    expected = (scaled.data.to(torch.float32) * scale).to(dtype)
    with poisoned_allocations():
        actual = fp8_dequantize(scaled, dtype)
        turned = fp8_dequantize(ScaledTensor(scaled.data.mT, scaled.scale.mT), dtype)
        some = slice(0, 1) if block == SQUARE else slice(0, 128)
        part = fp8_dequantize(ScaledTensor(scaled.data[0, :128, 128:256], scaled.scale[0, some, 1:2]), dtype)
        each = fp8_dequantize(ScaledTensor(scaled.data, scale), dtype)
    assert actual.dtype == dtype
    assert actual.is_contiguous()
    for found, wanted in (
        (actual, expected),
        (turned, expected.mT),
        (part, expected[0, :128, 128:256]),
        (each, expected),
    ):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def test_default_is_bfloat16() -> None:
    assert fp8_dequantize(fp8_quantize(torch.ones(2, 3))).dtype == torch.bfloat16


def test_numbers_that_half_precision_does_not_hold_are_infinite() -> None:
    scaled = fp8_quantize(torch.tensor([[7e4, -7e4, 1.0]]))
    assert fp8_dequantize(scaled, torch.float16)[0, :2].tolist() == [INF, -INF]


def test_no_gradient() -> None:
    x = torch.randn(3, 130, requires_grad=True)
    scaled = fp8_quantize(x)
    assert not scaled.data.requires_grad
    assert not scaled.scale.requires_grad
    learned = ScaledTensor(scaled.data, scaled.scale.requires_grad_())
    assert not fp8_dequantize(learned).requires_grad
