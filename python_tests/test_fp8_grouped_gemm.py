"""grouped_gemm of FP8 operands: the definition and the CPU's products against float64."""

from __future__ import annotations

import pytest
import torch

import grpo_kernels
from grpo_kernels import fp8_quantize, grouped_gemm
from grpo_kernels.fp8_quantize import ScaledTensor
from grpo_kernels.grouped_gemm import ops
from grpo_kernels.testing import assert_as_accurate
from python_tests.fp8_products import exact, exact_wgrad, problem, spaced, wgrad_problem, widened, with_bias
from python_tests.test_grouped_gemm import SEGMENTS

BACKENDS = ["native", "reference"]
RESULTS = [torch.float32, torch.bfloat16, torch.float16]
NAN = float("nan")


@pytest.fixture(params=BACKENDS, autouse=True)
def _backend(request: pytest.FixtureRequest) -> None:
    request.getfixturevalue("native_cpu")
    with grpo_kernels.backend(request.param):
        yield


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SEGMENTS)
def test_against_float64(name: str) -> None:
    """Rows of no expert hold NaN, and so does the memory between rows; the result has zeros there."""
    p = problem(*SEGMENTS[name])
    out = grouped_gemm(p.x, p.weight, p.offsets, out_dtype=torch.float32)
    assert_as_accurate(out, exact(p), exact(p, torch.float32))
    assert not out[p.end :].any()


def test_every_number() -> None:
    """Times one it is itself, subnormal numbers and signed zeros included."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)[:, None]
    x = ScaledTensor(spaced(codes.float().nan_to_num(NAN)), torch.ones(256, 1))
    x.data.view(torch.uint8).copy_(codes.view(torch.uint8))
    one = ScaledTensor(torch.ones(1, 1, 1).to(codes.dtype), torch.ones(1, 1, 1))
    out = grouped_gemm(x, one, torch.tensor([256]), out_dtype=torch.float32)
    torch.testing.assert_close(out, codes.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", RESULTS, ids=str)
@pytest.mark.parametrize(("width", "columns"), [(1, 1), (128, 128), (130, 257), (360, 16)])
def test_tails(width: int, columns: int, dtype: torch.dtype) -> None:
    p = problem(*SEGMENTS["tail"], width, columns, decades=0.2, power_of_two=True)
    p.x.scale.mul_(2.0**-7)
    out = grouped_gemm(p.x, p.weight, p.offsets.int(), out_dtype=dtype)
    assert out.dtype == dtype
    assert_as_accurate(out, exact(p), exact(p, torch.float32))


@pytest.mark.parametrize("decades", [20.0, 30.0])
def test_extreme_scales(decades: float) -> None:
    """Whose products alone may leave float32's range. A sum that would not be a normal number vanishes."""
    p = problem([4, 9], 9, 100, 8, decades)
    p.weight.scale.copy_(torch.tensor([1e-30, 1e30])[:, None, None])
    p.x.scale.copy_(torch.tensor([1e-12, 1e12, 1e25, 1.0, 1e-25, 1e-20, 1e-9, 1.0, 1e-30])[:, None])
    out = grouped_gemm(p.x, p.weight, p.offsets, out_dtype=torch.float32)
    rows = zip(out, exact(p), exact(p, torch.float32), strict=True)
    for ours, wanted, plain in rows:
        if wanted.abs().max() > torch.finfo(torch.float32).tiny:
            assert_as_accurate(ours, wanted, plain)
        else:
            assert ours.abs().max() < torch.finfo(torch.float32).tiny


def test_it_is_the_product_of_what_was_quantised() -> None:
    """Off by no more than the roundings of both operands: to four bits, and of the smallest to steps of 2^-9 scales."""
    operands = {(1, 128): torch.randn(40, 200), (128, 128): torch.randn(3, 72, 200)}
    offsets = torch.tensor([11, 11, 40])
    scaled = [fp8_quantize(values, block) for block, values in operands.items()]
    largest = [
        values.double().abs() * (1 + 2.0**-4)
        + widened(of._replace(data=torch.ones_like(of.data)), torch.float64) * 2.0**-10
        for of, values in zip(scaled, operands.values(), strict=True)
    ]
    plain, size = (
        grouped_gemm(*(values.double() for values in of), offsets)
        for of in (operands.values(), [values.abs() for values in operands.values()])
    )
    error = (grouped_gemm(*scaled, offsets, out_dtype=torch.float32) - plain).abs()
    assert (error <= grouped_gemm(*largest, offsets) - size).all()
    assert (error > size * 2.0**-12).any()  # it was quantised


def test_the_gradient_of_x_is_the_same_product() -> None:
    """With the transposed copy of the weights, which has the same numbers."""
    grad, weight = torch.randn(40, 72), torch.randn(3, 72, 200)
    offsets = torch.tensor([11, 11, 33])
    forward, backward = fp8_quantize(weight, (128, 128), transpose="both")
    found = grouped_gemm(fp8_quantize(grad), backward, offsets, out_dtype=torch.float32)
    numbers = [widened(forward, dtype).mT.contiguous() for dtype in (torch.float64, torch.float32)]
    rows = [widened(fp8_quantize(grad), dtype) for dtype in (torch.float64, torch.float32)]
    wanted = [grouped_gemm(r, w, offsets) for r, w in zip(rows, numbers, strict=True)]
    assert_as_accurate(found, *wanted)


# --- the bias --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*RESULTS, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["ragged", "empty_experts", "only_tail", "no_rows", "tail"])
def test_bias_is_added_in_float32_and_rounded_once(name: str, dtype: torch.dtype) -> None:
    """To the bit as if added by hand, for results of every dtype; rows of no expert stay 0."""
    p = problem(*SEGMENTS[name], 300)
    bias = (torch.randn(len(p.offsets), 72) * 3000).to(dtype)
    product = grouped_gemm(p.x, p.weight, p.offsets, out_dtype=torch.float32)
    for out_dtype in RESULTS:
        out = grouped_gemm(p.x, p.weight, p.offsets, bias=bias, out_dtype=out_dtype)
        assert out.dtype == out_dtype
        assert torch.equal(out, with_bias(p, product, bias).to(out_dtype))


def test_bias_of_any_layout() -> None:
    p = problem([3, 7], 9)
    bias = torch.randn(2, 72)
    wanted = grouped_gemm(p.x, p.weight, p.offsets, bias=bias)
    assert torch.equal(grouped_gemm(p.x, p.weight, p.offsets, bias=bias.T.contiguous().T), wanted)
    shared = bias[:1].expand(2, -1)
    once = grouped_gemm(p.x, p.weight, p.offsets, bias=shared.contiguous())
    assert torch.equal(grouped_gemm(p.x, p.weight, p.offsets, bias=shared), once)


def test_a_nan_bias_stays_with_its_expert() -> None:
    p = problem([4, 4, 9], 12)
    bias = torch.zeros(3, 72)
    bias[1], bias[0, 5], bias[2, 70] = NAN, NAN, float("inf")  # the second expert has no rows
    out = grouped_gemm(p.x, p.weight, p.offsets, bias=bias, out_dtype=torch.float32)
    product = grouped_gemm(p.x, p.weight, p.offsets, out_dtype=torch.float32)
    product[:4, 5], product[4:9, 70] = NAN, float("inf")
    torch.testing.assert_close(out, product, rtol=0, atol=0, equal_nan=True)


def test_bias_needs_no_gradient_of_its_own() -> None:
    p = problem([3, 5], 5)
    assert not grouped_gemm(p.x, p.weight, p.offsets, bias=torch.zeros(2, 72, requires_grad=True)).requires_grad


# --- what must stay where it is --------------------------------------------------------------------------------------


def test_nan_stays_with_its_row_and_its_block() -> None:
    p = problem([4, 4, 9, 12], 12, columns=130)
    p.x.scale[5, 1] = NAN
    p.x.data.view(torch.uint8)[10, 3] = 0xFF
    p.weight.scale[1] = NAN  # it has no rows
    p.weight.scale[0, 1, 0] = NAN
    out = grouped_gemm(p.x, p.weight, p.offsets)
    wanted = torch.zeros(12, 130, dtype=torch.bool)
    wanted[5], wanted[10], wanted[:4, 128:] = True, True, True
    assert torch.equal(out.isnan(), wanted)
    assert out.dtype == torch.bfloat16


def test_nothing_is_differentiable() -> None:
    p = problem([3, 5], 5)
    out = grouped_gemm(ScaledTensor(p.x.data, p.x.scale.requires_grad_()), p.weight, p.offsets)
    assert not out.requires_grad


def test_operands_of_any_layout() -> None:
    p = problem([3, 7], 9)
    out = grouped_gemm(p.x, p.weight, p.offsets)
    dense = [
        ScaledTensor(data.clone(memory_format=torch.contiguous_format), scale.contiguous()) for data, scale in p[:2]
    ]
    turned = ScaledTensor(p.weight.data.mT.contiguous().mT, p.weight.scale.mT.contiguous().mT)
    assert torch.equal(grouped_gemm(*dense, p.offsets), out)
    assert torch.equal(grouped_gemm(p.x, turned, p.offsets), out)


# --- the gradient of the weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("ends", "rows"), [([128, 128, 384], 500), ([0, 128, 150], 150), ([0, 0], 9), ([256], 256)])
def test_weight_gradient(ends: list[int], rows: int, dtype: torch.dtype) -> None:
    """Of experts without rows it is 0, and an accumulator is left as it was."""
    p = wgrad_problem(ends, rows)
    exact, plain = exact_wgrad(p), exact_wgrad(p, torch.float32)
    out = ops.fp8_grouped_gemm_wgrad(*p.x, *p.grad, p.offsets, dtype, "native")
    assert_as_accurate(out, exact, plain)
    for turned in (False, True):
        start = torch.randn(exact.shape)
        buffer = start.mT.contiguous().mT if turned else start.clone()
        version = buffer._version
        ops.fp8_grouped_gemm_wgrad_add_(*p.x, *p.grad, p.offsets, buffer, "native")
        assert buffer._version > version
        assert_as_accurate(buffer, start.double() + exact, start + plain)
        empty = p.offsets.diff(prepend=torch.zeros(1, dtype=torch.int64)) == 0
        assert torch.equal(buffer[empty], start[empty])
        assert not out[empty].any()


def test_tiles_of_two_experts_raise() -> None:
    p = wgrad_problem([100, 200], 200)
    for op, last in (
        ("fp8_grouped_gemm_wgrad", torch.float32),
        ("fp8_grouped_gemm_wgrad_add_", torch.zeros(2, 40, 72)),
    ):
        with pytest.raises(ValueError, match=f"{op}: expert 0 must end at a multiple of 128 or at R = 200, got 100"):
            getattr(ops, op)(*p.x, *p.grad, p.offsets, last, "native")
