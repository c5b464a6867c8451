"""The Triton kernels of FP8 products, run by Triton's interpreter on CPU tensors: the table of tiles, and the product.

Results are float32: the interpreter truncates where a GPU rounds to bfloat16.
"""

from __future__ import annotations

import mmap

import pytest
import torch
from torch import Tensor

import grpo_kernels
from grpo_kernels.fp8_quantize import ScaledTensor
from grpo_kernels.grouped_gemm import ops, reference
from grpo_kernels.testing import assert_as_accurate, guard_input, guarded_allocations
from python_tests.fp8_products import (
    Problem,
    Tile,
    exact,
    exact_wgrad,
    problem,
    tile_list,
    wgrad_problem,
    with_bias,
)

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.usefixtures("triton_on_cpu"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]
NAN = float("nan")
# What a tile's rows and their loads depend on: the architecture, whether experts have few rows, and K.
FORMS = {
    "specialized": (90, False, 200),
    "few": (90, True, 200),
    "many": (100, False, 130),
    "vector": (89, False, 144),
    "scalar": (89, False, 130),
}
SEGMENTS = {
    "ragged": ([3, 20, 21, 290], 290),
    "empty": ([0, 7, 7, 7, 135, 135], 140),
    "one_gets_all": ([0, 0, 257, 257], 257),
    "one_row": ([0, 1, 1], 1),
    "only_tail": ([0, 0, 0], 9),
    "no_rows": ([0, 0], 0),
}


def _on(monkeypatch: pytest.MonkeyPatch, architecture: int, few: bool) -> None:
    from grpo_kernels.grouped_gemm import _fp8_config_triton, _fp8_triton

    monkeypatch.setattr(_fp8_triton, "architecture", lambda tensor: architecture)
    monkeypatch.setattr(_fp8_config_triton, "FEW_ROWS", 2**31 if few else 0)


@pytest.fixture(params=FORMS)
def width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """K of a form, which the launcher then takes."""
    architecture, few, width = FORMS[request.param]
    _on(monkeypatch, architecture, few)
    return width


def product(p: Problem, bias: Tensor | None = None) -> Tensor:
    return grpo_kernels.grouped_gemm(p.x, p.weight, p.offsets, bias=bias, out_dtype=torch.float32)


def check(p: Problem) -> None:
    out = product(p)
    assert_as_accurate(out, exact(p), exact(p, torch.float32))
    assert not out[p.end :].any()


# --- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_m", [64, 128])
def test_the_table_is_that_of_the_model(block_m: int) -> None:
    from grpo_kernels.grouped_gemm._fp8_triton import tile_table

    generator = torch.Generator().manual_seed(block_m)
    sizes = torch.tensor([0, 0, 1, 63, 64, 65, 127, 128, 129, 700])
    lists = [sizes[torch.randint(10, (count,), generator=generator)].cumsum(0).tolist() for count in (1, 3, 8, 17)]
    lists += [[0], [0, 20000], [5, 3, 90], [-2, 40, 10**9], [2**31 - 1, 0, 7], [2**40, 3], [-(2**40), 2**33]]
    for index, offsets in enumerate(lists):
        dtype = torch.int32 if index % 2 and max(map(abs, offsets)) < 2**31 else torch.int64
        rows = min(max(offsets[-1], 0), 20000) + (1, 130)[index % 3 == 0]
        table = tile_table(torch.tensor(offsets, dtype=dtype), rows, block_m)
        count = int(table[0, 0])
        assert [Tile(*entry) for entry in table[1 : count + 1, :3].tolist()] == tile_list(offsets, rows, block_m)


def test_the_last_rows_that_can_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    from grpo_kernels.grouped_gemm import _fp8_triton

    monkeypatch.setattr(_fp8_triton, "TABLE_BLOCK", 2**17)
    rows, block_m = 2**31 - 2**14, 2**14
    offsets = [rows - 70000, rows - 3]
    table = _fp8_triton.tile_table(torch.tensor(offsets), rows, block_m)
    listed = [Tile(*entry) for entry in table[1 : int(table[0, 0]) + 1, :3].tolist()]
    assert listed == tile_list(offsets, rows, block_m)


# --- values ----------------------------------------------------------------------------------------------------------


def test_against_float64(width: int) -> None:
    """Every way of loading and both heights of a tile. Segments of less than a tile, of more, of none; NaN behind."""
    check(problem([3, 3, 90, 270], 290, width, 136))


@pytest.mark.parametrize("name", SEGMENTS)
def test_segments(name: str) -> None:
    check(problem(*SEGMENTS[name]))


@pytest.mark.parametrize(("width", "columns"), [(1, 1), (128, 128), (37, 257), (200, 72), (256, 9)])
def test_tails(width: int, columns: int) -> None:
    check(problem([3, 40], 41, width, columns))


def test_extreme_scales(width: int) -> None:
    """Whose products alone may leave float32's range. A sum that would not be a normal number vanishes."""
    p = problem([4, 9], 9, width, 8)
    p.weight.scale.copy_(torch.tensor([1e-30, 1e30])[:, None, None])
    p.x.scale.copy_(torch.tensor([1e-12, 1e12, 1e25, 1.0, 1e-25, 1e-20, 1e-9, 1.0, 1e-30])[:, None])
    for ours, wanted, plain in zip(product(p), exact(p), exact(p, torch.float32), strict=True):
        if wanted.abs().max() > torch.finfo(torch.float32).tiny:
            assert_as_accurate(ours, wanted, plain)
        else:
            assert ours.abs().max() < torch.finfo(torch.float32).tiny


def test_every_number(width: int) -> None:
    """Of both operands, times one: subnormal numbers, zeros of either sign and NaN."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    x, weight = torch.zeros(256, width).to(codes.dtype), torch.zeros(1, 256, width).to(codes.dtype)
    x[:, 0], weight[0, :, 0] = codes, 1.0
    ones = [torch.ones(256, -(-width // 128)), torch.ones(1, 2, -(-width // 128))]
    for turn in (False, True):
        if turn:
            x, weight = weight[0], x[None]
        operands = (ScaledTensor(x, ones[0]), ScaledTensor(weight, ones[1]))
        out = grpo_kernels.grouped_gemm(*operands, torch.tensor([256]), out_dtype=torch.float32)
        out = out.T if turn else out
        torch.testing.assert_close(out, codes.float()[:, None].expand(256, 256), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_bias(width: int, dtype: torch.dtype) -> None:
    """To the bit as if added by hand in float32. Rows of no expert stay 0; NaN stays with its expert."""
    p = problem([3, 3, 90, 170], 190, width, 136)
    bias = (torch.randn(4, 136) * 3000).to(dtype)
    bias[1], bias[2, 130], bias[3, 0] = NAN, NAN, float("inf")  # the second expert has no rows
    out = product(p, bias)
    torch.testing.assert_close(out, with_bias(p, product(p), bias), rtol=0, atol=0, equal_nan=True)
    assert out.isnan().sum() == 87
    assert torch.equal(product(p, bias.T.contiguous().T).nan_to_num(), out.nan_to_num())


def test_any_number_of_programs_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    from grpo_kernels.grouped_gemm import _fp8_triton

    p = problem([66, 66, 70], 71, columns=140)
    results = []
    for count in (1, 2, 1000):
        monkeypatch.setattr(_fp8_triton, "programs", lambda tensor, items, on_each, count=count: min(count, items))
        results.append(product(p))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_several_groups_of_row_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from grpo_kernels.grouped_gemm import _fp8_config_triton

    monkeypatch.setattr(_fp8_config_triton, "row_blocks", lambda mib, block_m, width: 2)
    check(problem([0, 400, 401], 401, 40, 260))


def test_operands_of_any_layout(width: int) -> None:
    """Rows that do not begin at multiples of 16 bytes, a dense axis that is not K, one weight for all experts."""
    p = problem([3, 30, 40], 47, width, 40)
    wanted = product(p)
    data, codes = p.x.data.contiguous(), p.weight.data.view(torch.uint8)
    wide = torch.zeros(47, width + 5, dtype=torch.uint8)
    wide[:, 5:] = data.view(torch.uint8)
    turned = ScaledTensor(codes.mT.contiguous().view(data.dtype).mT, p.weight.scale.mT.contiguous().mT)
    for x in (data, data.T.contiguous().T, wide[:, 5:].view(data.dtype)):
        scaled = ScaledTensor(x, p.x.scale.contiguous())
        assert torch.equal(product(p._replace(x=scaled, weight=turned)), wanted)
    shared = ScaledTensor(p.weight.data[:1].expand(3, -1, -1), p.weight.scale[:1].expand(3, -1, -1))
    check(p._replace(weight=shared))


def test_older_gpus_widen_to_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly, where scales are powers of two."""
    _on(monkeypatch, 80, False)
    p = problem([3, 3, 60], 63, 130, 72, power_of_two=True)
    check(p)
    bias = torch.randn(3, 72)
    assert torch.equal(product(p, bias), with_bias(p, product(p), bias))


# --- what is not there -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offsets", [[5, 3, 90], [-2, 40, 200], [2**31 - 1, 0, 7]], ids=str)
def test_bad_offsets_are_cut_off_as_in_the_definition(width: int, offsets: list[int]) -> None:
    """Nothing out of bounds is read or written, and every row has one owner."""
    p = problem([30, 60, 90], 90, width)
    bad = torch.tensor(offsets)
    with guarded_allocations():
        given = [guard_input(tensor) for tensor in (*p.x, *p.weight, torch.zeros(3, 72))]
        out = ops.fp8_grouped_gemm(*given[:4], bad, given[4], torch.float32, "triton")
    good = p._replace(offsets=reference.segment_ends(bad, 90))
    assert_as_accurate(out, exact(good), exact(good, torch.float32))


def test_nan_stays_with_its_row_and_its_block(width: int) -> None:
    p = problem([4, 4, 9, 12], 12, width, columns=130)
    p.x.scale[5, 1] = NAN
    p.x.data.view(torch.uint8)[10, 3] = 0xFF
    p.weight.scale[1] = NAN  # it has no rows
    p.weight.scale[0, 1, 0] = NAN
    wanted = torch.zeros(12, 130, dtype=torch.bool)
    wanted[5], wanted[10], wanted[:4, 128:] = True, True, True
    assert torch.equal(product(p).isnan(), wanted)


def test_offsets_beyond_32_bits(width: int) -> None:
    """Rows, experts and scales that lie more than 2^31 elements apart, in memory of which only these pages exist."""
    p = problem([70, 150], 150, width, 24)
    stride = 2**24 - 16
    places = [(stride, 1), (1, 2**31 + 4), (2**31 + 16, -(-width // 16) * 16, 1), (2**31 + 64, 1, 1)]
    spread = []
    for tensor, strides in zip((*p.x, *p.weight), places, strict=True):
        elements = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, strides, strict=True))
        # No page of it is reserved.
        memory = mmap.mmap(-1, elements * tensor.element_size(), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
        view = torch.frombuffer(memory, dtype=torch.uint8).view(tensor.dtype).as_strided(tensor.shape, strides)
        spread.append(view.copy_(tensor))
    x, weight = ScaledTensor(*spread[:2]), ScaledTensor(*spread[2:])
    assert torch.equal(product(p._replace(x=x, weight=weight)), product(p))


# --- the gradient of the weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", [90, 100, 80])
@pytest.mark.parametrize(("ends", "rows"), [([128, 128, 384], 390), ([0, 128, 150], 150), ([0, 0], 9)])
def test_weight_gradient(ends: list[int], rows: int, architecture: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of no expert hold NaN. Experts without rows: 0, and an accumulator stays as it was, in either layout."""
    from grpo_kernels.grouped_gemm import _fp8_wgrad_triton

    monkeypatch.setattr(_fp8_wgrad_triton, "architecture", lambda tensor: architecture)
    p = wgrad_problem(ends, rows, 136, 40)
    if architecture == 80:  # scales that bfloat16 has
        p = p._replace(
            **{
                name: of._replace(scale=of.scale.log2().round().exp2())
                for name, of in p._asdict().items()
                if name != "offsets"
            }
        )
    wanted, plain = exact_wgrad(p), exact_wgrad(p, torch.float32)
    out = ops.fp8_grouped_gemm_wgrad(*p.x, *p.grad, p.offsets, torch.float32, "triton")
    assert_as_accurate(out, wanted, plain)
    empty = p.offsets.diff(prepend=torch.zeros(1, dtype=torch.int64)) == 0
    assert not out[empty].any()
    turned = rows == 150
    start = torch.randn(wanted.shape)
    buffer = start.mT.contiguous().mT if turned else start.clone()
    version = buffer._version
    ops.fp8_grouped_gemm_wgrad_add_(*p.x, *p.grad, p.offsets, buffer, "triton")
    assert buffer._version > version
    assert_as_accurate(buffer, start.double() + wanted, start + plain)
    assert torch.equal(buffer[empty], start[empty])


@pytest.mark.parametrize("architecture", [90, 100])
def test_tiles_of_two_experts_are_nan(architecture: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from grpo_kernels.grouped_gemm import _fp8_wgrad_triton

    monkeypatch.setattr(_fp8_wgrad_triton, "architecture", lambda tensor: architecture)
    p = wgrad_problem([128, 200, 256, 256, 300], 300, 16, 24)
    out = ops.fp8_grouped_gemm_wgrad(*p.x, *p.grad, p.offsets, torch.float32, "triton")
    assert out.isnan().flatten(1).all(1).tolist() == [False, True, True, False, False]
    assert_as_accurate(out[[0, 3, 4]], exact_wgrad(p)[[0, 3, 4]], exact_wgrad(p, torch.float32)[[0, 3, 4]])
