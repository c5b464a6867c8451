"""fp8_quantize: bit for bit a loop over tiles; what tiles with anything in them become."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grpo_kernels import ScaledTensor, fp8_dequantize, fp8_quantize
from grpo_kernels.testing import guard_input, guarded_allocations, poisoned_allocations
from python_tests.fp8_problems import BLOCKS, DTYPES, EPS, INF, NAN, POWERS, ROWS, SQUARE, bits, definition, wild

pytestmark = pytest.mark.usefixtures("backend")


def assert_same(actual: ScaledTensor, expected: ScaledTensor) -> None:
    assert actual.data.dtype == torch.float8_e4m3fn
    assert actual.scale.dtype == torch.float32
    assert torch.equal(bits(actual.data), bits(expected.data))
    assert torch.equal(bits(actual.scale), bits(expected.scale))


@poisoned_allocations()
def check(x: Tensor, block: tuple[int, int], power_of_two: bool, eps: float = EPS) -> None:
    """Of x, of its transpose, and both at once."""
    options: dict[str, Any] = {"power_of_two_scales": power_of_two, "eps": eps}
    expected = definition(x, block, power_of_two, eps), definition(x.mT, block, power_of_two, eps)
    assert_same(fp8_quantize(x, block, **options), expected[0])
    assert_same(fp8_quantize(x, block, transpose=True, **options), expected[1])
    for actual, wanted in zip(fp8_quantize(x, block, transpose="both", **options), expected, strict=True):
        assert_same(actual, wanted)


# --- the definition --------------------------------------------------------------------------------------------------


@POWERS
@BLOCKS
@pytest.mark.parametrize("shape", [(1, 1), (3, 127), (4, 128), (7, 129), (130, 100), (129, 257), (2, 2880)], ids=str)
def test_a_loop_over_tiles(shape: tuple[int, int], block: tuple[int, int], power_of_two: bool) -> None:
    check(wild(*shape), block, power_of_two)


@POWERS
@BLOCKS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype: torch.dtype, block: tuple[int, int], power_of_two: bool) -> None:
    x = wild(131, 150).to(dtype)
    x[5, 7], x[130, 2] = NAN, -INF
    check(x, block, power_of_two)


@settings(max_examples=60)
@given(
    st.integers(1, 3),
    st.integers(1, 140),
    st.sampled_from([ROWS, SQUARE]),
    st.booleans(),
    st.floats(1e-30, 1.0),
    st.lists(st.floats(width=32), min_size=1, max_size=12),
)
def test_any_numbers(
    rows: int, width: int, block: tuple[int, int], powers: bool, eps: float, values: list[float]
) -> None:
    """NaN, infinities and subnormals among them."""
    flat = torch.tensor(values).repeat(rows * width // len(values) + 1)[: rows * width]
    check(flat.view(rows, width), block, powers, eps)


@BLOCKS
@pytest.mark.parametrize("transpose", [False, True, "both"])
def test_a_batch_is_its_matrices(block: tuple[int, int], transpose: Any) -> None:
    x = wild(3, 130, 200).bfloat16()
    x[1, 3, 4] = NAN
    whole = fp8_quantize(x, block, transpose=transpose)
    for index in range(3):
        parts = fp8_quantize(x[index], block, transpose=transpose)
        pairs = zip(whole, parts, strict=True) if transpose == "both" else [(whole, parts)]
        for one, other in pairs:
            assert_same(ScaledTensor(one.data[index], one.scale[index]), other)


# --- layout ----------------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows of a larger matrix": lambda x: torch.nn.functional.pad(x, (3, 5))[..., 3:-5],
    "every other row": lambda x: x.repeat_interleave(2, -2)[..., ::2, :],
    "transposed": lambda x: x.mT.contiguous().mT,
    "every other column": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "batch behind": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "one row for all": lambda x: x[..., :1, :].expand(x.shape),
    "one column for all": lambda x: x[..., :1].expand(x.shape),
}


@BLOCKS
@pytest.mark.parametrize("name", LAYOUTS)
def test_inputs_of_any_layout(name: str, block: tuple[int, int]) -> None:
    x = guard_input(LAYOUTS[name](wild(2, 70, 133)))
    with guarded_allocations():
        for transpose in (False, True):
            actual = fp8_quantize(x, block, transpose=transpose)
            assert_same(actual, fp8_quantize(x.contiguous(), block, transpose=transpose))


@pytest.mark.parametrize("shape", [(5, 100), (3, 130, 257), (128, 2880), (1, 1), (2, 128, 256)], ids=str)
def test_memory_formats(shape: tuple[int, ...]) -> None:
    """What TMA loads: rows 16 bytes apart or a multiple, scales of neighbouring rows beside each other."""
    rows, width = shape[-2:]
    for transpose, (height, length) in ((False, (rows, width)), (True, (width, rows))):
        data, scale = fp8_quantize(torch.ones(shape), transpose=transpose)
        stride, column = -(-length // 16) * 16, -(-height // 4) * 4
        assert data.shape == (*shape[:-2], height, length)
        assert scale.shape == (*shape[:-2], height, -(-length // 128))
        assert data.stride()[-2:] == (stride, 1)
        assert scale.stride()[-2:] == (1, column)
        if len(shape) == 3:
            assert data.stride(0) == height * stride
            assert scale.stride(0) == column * scale.shape[-1]
        square = fp8_quantize(torch.ones(shape), SQUARE, transpose=transpose)
        assert square.data.stride() == data.stride()
        assert square.scale.shape == (*shape[:-2], -(-height // 128), -(-length // 128))
        assert square.scale.is_contiguous()


@BLOCKS
def test_nothing_is_written_between_rows(block: tuple[int, int]) -> None:
    """The bytes behind a row up to the next, and behind the scales of a tile's rows, belong to nobody."""
    x = wild(130, 133)
    with guarded_allocations():
        for data, scale in fp8_quantize(x, block, transpose="both"):
            rows, width = data.shape
            between = (rows - 1, data.stride(0) - width)
            gaps = data.view(torch.uint8).as_strided(between, data.stride(), data.storage_offset() + width)
            assert between[1] > 0
            assert gaps.unique().tolist() == [0xF5, 0xFF]  # the pattern of guarded memory
            if block == ROWS:
                tail = (scale.shape[1] - 1, scale.stride(1) - rows)
                behind = scale.view(torch.int32).as_strided(tail, (scale.stride(1), 1), scale.storage_offset() + rows)
                assert tail[1] > 0
                assert behind.unique().tolist() == [-655371]


@BLOCKS
@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 0), (0, 128, 128), (2, 0, 130), (2, 130, 0)], ids=str)
def test_empty(shape: tuple[int, ...], block: tuple[int, int]) -> None:
    plain, transposed = fp8_quantize(torch.ones(shape, dtype=torch.bfloat16), block, transpose="both")
    rows, width = shape[-2:]
    high, wide = -(-rows // 128), -(-width // 128)
    assert plain.data.shape == shape
    assert transposed.data.shape == (*shape[:-2], width, rows)
    assert plain.scale.shape == (*shape[:-2], high if block == SQUARE else rows, wide)
    assert transposed.scale.shape == (*shape[:-2], wide if block == SQUARE else width, high)
    for scaled in (plain, transposed):
        assert scaled.data.numel() == scaled.scale.numel() == 0
        assert fp8_dequantize(scaled).shape == scaled.data.shape


@BLOCKS
@pytest.mark.parametrize("transpose", [False, True, "both"])
def test_threads_change_nothing(transpose: Any, block: tuple[int, int]) -> None:
    """Nor does it matter how many rows there are."""
    x = wild(600, 1031).bfloat16()
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found = fp8_quantize(x, block, transpose=transpose)
            results.append(list(found) if transpose == "both" else [found])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same(a, b)
            assert torch.equal(fp8_dequantize(a), fp8_dequantize(b))
    if transpose is False:
        alone = fp8_quantize(x[:128], block)
        assert torch.equal(bits(alone.data), bits(results[0][0].data[:128]))


# --- tiles with anything in them -------------------------------------------------------------------------------------


def one_tile(values: list[float], **options: Any) -> tuple[float, list[int]]:
    data, scale = fp8_quantize(torch.tensor([values]), **options)
    return scale.item(), bits(data)[0].tolist()


def test_zeros_keep_their_sign_and_get_the_scale_of_eps() -> None:
    assert one_tile([0.0, -0.0]) == (2.0**-48, [0, 0x80])  # 448 * 2^-49 < 1e-12 <= 448 * 2^-48
    assert one_tile([0.0, -0.0], eps=0.5) == (2.0**-9, [0, 0x80])
    scale, codes = one_tile([-0.0, 0.0], power_of_two_scales=False)
    assert (scale, codes) == (torch.tensor(EPS).div(448).item(), [0x80, 0])


def test_tiles_below_eps_share_its_scale() -> None:
    assert one_tile([1e-3, -(2.0**-9)], eps=1.0) == (2.0**-8, [0x28, 0xB0])


@pytest.mark.parametrize("exponent", [-40, -8, 0, 3, 110, 119])
def test_the_scale_is_the_smallest_that_will_do(exponent: int) -> None:
    largest = torch.tensor(448.0 * 2.0**exponent)
    above = largest.nextafter(torch.tensor(INF)).item()
    assert one_tile([largest.item()], eps=1e-30) == (2.0**exponent, [0x7E])
    assert one_tile([above], eps=1e-30) == (2.0 ** (exponent + 1), [0x76])
    assert one_tile([-largest.item() / 2], eps=1e-30) == (2.0 ** (exponent - 1), [0xFE])


@POWERS
@pytest.mark.parametrize("size", [3e38, 1e30, 1e-20, 1e-29])
def test_huge_and_tiny_numbers(size: float, power_of_two: bool) -> None:
    """Whatever the size, the largest number is as exact as any; nothing overflows on the way."""
    x = torch.tensor([[size, -size, size / 3, 0.0]])
    scaled = fp8_quantize(x, power_of_two_scales=power_of_two, eps=1e-30)
    assert scaled.scale.isfinite().all()
    error = (fp8_dequantize(scaled, torch.float64) - x.double()).abs()
    assert (error <= x.double().abs() / 16).all()


def test_what_rounds_beyond_float32_comes_back_infinite() -> None:
    """As in any narrower format: 2^128 is the nearest number with three bits of mantissa."""
    largest = torch.finfo(torch.float32).max
    assert one_tile([largest, -largest / 2]) == (2.0**120, [0x78, 0xF0])
    back = fp8_dequantize(fp8_quantize(torch.tensor([[largest, -largest / 2]])), torch.float32)
    assert back.tolist() == [[INF, -(2.0**127)]]


@BLOCKS
@POWERS
@pytest.mark.parametrize("bad", [NAN, -NAN, INF, -INF])
def test_a_bad_number_spoils_its_tile_and_no_other(bad: float, power_of_two: bool, block: tuple[int, int]) -> None:
    x = wild(140, 300)
    options: dict[str, Any] = {"block": block, "power_of_two_scales": power_of_two}
    good = fp8_quantize(x, **options)
    x[130, 140] = bad
    actual = fp8_quantize(x, **options)
    row = slice(130, 131) if block == ROWS else slice(128, 140)
    scale_row = 130 if block == ROWS else 1
    assert actual.scale[scale_row, 1].isnan()
    assert (bits(actual.data)[row, 128:256] == 0x7F).all()
    assert fp8_dequantize(actual)[row, 128:256].isnan().all()
    good.data[row, 128:256], good.scale[scale_row, 1] = actual.data[row, 128:256], actual.scale[scale_row, 1]
    assert_same(actual, good)


def test_float64_beyond_float32_is_an_infinity() -> None:
    scaled = fp8_quantize(torch.tensor([[1e300, 1.0], [1.0, 1.0]], dtype=torch.float64))
    assert scaled.scale.isnan().tolist() == [[True], [False]]
    assert fp8_quantize(torch.tensor([[1e-300]], dtype=torch.float64)).data.float().item() == 0.0


# --- instruction sets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["native"], indirect=True)
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_every_instruction_set(isa: str) -> None:
    """The same bits, in a process that is told to use less than the processor has."""
    names = "native and (loop_over or every_dtype or every_number or every_boundary or dequantised or batch_is)"
    files = [str(Path(__file__).with_name(f"test_{name}.py")) for name in ("fp8_quantize", "fp8_dequantize", "e4m3")]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files, "-k", names],
        env=dict(os.environ, GRPO_KERNELS_ISA=isa, OMP_WAIT_POLICY="passive"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:]
