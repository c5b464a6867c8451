"""The activation that quantises: the bits of moe_glu and fp8_quantize one after the other, in float32 between."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from grpo_kernels.fp8_quantize import ops as fp8
from grpo_kernels.moe_experts import glu_reference, ops
from grpo_kernels.moe_experts.ops import QuantizedGradients, QuantizedNeeds
from grpo_kernels.moe_experts.reference import Activation, glu
from grpo_kernels.testing import (
    accuracy_budget,
    accuracy_error,
    assert_as_accurate,
    guard_input,
    guarded_allocations,
    poisoned_allocations,
)

pytestmark = pytest.mark.usefixtures("native_cpu")

NAN, INF = float("nan"), float("inf")
EPS, GRAD_EPS = 1e-12, 1e-30
EVERYTHING = QuantizedNeeds(True, True, True, True, True, True)
ALONE = [QuantizedNeeds(*(name == field for name in QuantizedNeeds._fields)) for field in QuantizedNeeds._fields]
# clamped, alpha, limit, interleaved
SWIGLU, TURNED, CLAMPED, GPT_OSS = (
    (False, 1.0, 1.0, False),
    (False, 1.0, 1.0, True),
    (True, 1.3, 2.0, False),
    (True, 1.702, 7.0, True),
)
ACTIVATIONS = pytest.mark.parametrize("activation", [SWIGLU, TURNED, CLAMPED, GPT_OSS], ids=str)
SHAPES = pytest.mark.parametrize(
    "shape", [(5, 1), (130, 7), (127, 64), (7, 96), (256, 128), (129, 130), (6, 300), (128, 257)], ids=str
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


class Problem(NamedTuple):
    """Rows with their slots. Those of padding hold NaN."""

    preact: Tensor
    grad: Tensor
    inv_map: Tensor
    weights: Tensor
    row_terms: Tensor

    @property
    def kept(self) -> tuple[Tensor, Tensor]:
        return tiles(self.preact, EPS)


def problem(rows: int, width: int, dtype: torch.dtype = torch.float32, padding: bool = True) -> Problem:
    weights = torch.rand(rows + 2, 2) + 0.1
    inv_map = torch.randperm(weights.numel())[:rows].int()
    preact, grad = 2 * torch.randn(rows, 2 * width), torch.randn(rows, width) * torch.exp(torch.randn(rows, 1))
    if padding:
        dead = torch.rand(rows) < 0.2
        inv_map[dead], preact[dead], grad[dead] = -1, NAN, NAN
    return Problem(preact.to(dtype), grad.to(dtype), inv_map, weights, torch.randn(rows))


def bits(tensor: Tensor) -> Tensor:
    if not tensor.dtype.is_floating_point:
        return tensor
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def assert_same(found: Any, expected: Any) -> None:
    """Shapes, strides, dtypes and bits; any NaN for a NaN."""
    names = getattr(found, "_fields", range(len(found)))
    for name, a, b in zip(names, found, expected, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype), name
        if a.element_size() > 1:
            a, b = torch.where(a.isnan(), NAN, a), torch.where(b.isnan(), NAN, b)
        assert torch.equal(bits(a), bits(b)), name


def tiles(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return fp8.fp8_quantize(x, False, True, True, False, eps, "native")[:2]


def turned_tiles(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return fp8.fp8_quantize(x, False, True, False, True, eps, "native")[2:]


def dequantised(data: Tensor, scale: Tensor) -> Tensor:
    return fp8.fp8_dequantize(data, scale, torch.float32, "native")


def forward(p: Problem, activation: Any, keep: bool = True, eps: float = EPS) -> tuple[Tensor, ...]:
    with guarded_allocations(), poisoned_allocations():
        return ops.moe_glu_quantize(guard_input(p.preact), guard_input(p.inv_map), *activation, keep, eps, "native")


def backward(
    p: Problem,
    activation: Any,
    needs: QuantizedNeeds = EVERYTHING,
    dtype: torch.dtype = torch.float32,
    kept: tuple[Tensor, Tensor] | None = None,
    with_grad: bool = True,
    with_terms: bool = True,
) -> QuantizedGradients:
    data, scale = p.kept if kept is None else kept
    with guarded_allocations(), poisoned_allocations():
        found = ops.moe_glu_backward_quantize(
            guard_input(data.view(torch.uint8)).view(data.dtype),
            guard_input(scale),
            guard_input(p.grad) if with_grad else None,
            guard_input(p.inv_map),
            guard_input(p.weights),
            guard_input(p.row_terms) if with_terms else None,
            *activation,
            *needs,
            EPS,
            GRAD_EPS,
            dtype,
            "native",
        )
    return QuantizedGradients(*found)


def composed_forward(p: Problem, activation: Any) -> tuple[Tensor, ...]:
    """moe_glu of float32, then fp8_quantize."""
    activated = ops.moe_glu(p.preact.float(), p.inv_map, None, *activation, "native")
    return *tiles(activated, EPS), *tiles(p.preact.float().where((p.inv_map >= 0)[:, None], 0.0), EPS)


def composed_backward(p: Problem, activation: Any, dtype: torch.dtype) -> QuantizedGradients:
    """fp8_dequantize and moe_glu_backward of float32, then fp8_quantize."""
    grad, activated, weights = ops.moe_glu_backward(
        dequantised(*p.kept), p.grad.float(), p.inv_map, p.weights, p.row_terms, *activation, True, True, True, "native"
    )
    return QuantizedGradients(
        *tiles(grad, GRAD_EPS),
        *turned_tiles(grad, GRAD_EPS),
        grad.to(dtype),
        *turned_tiles(activated, EPS),
        activated.to(dtype),
        weights,
    )


# --- the composition --------------------------------------------------------------------------------------------------


@DTYPES
@ACTIVATIONS
@SHAPES
def test_the_bits_of_the_composition(shape: tuple[int, int], activation: Any, dtype: torch.dtype) -> None:
    p = problem(*shape, dtype)
    assert_same(forward(p, activation), composed_forward(p, activation))
    assert_same(backward(p, activation, dtype=dtype), composed_backward(p, activation, dtype))


@pytest.mark.parametrize("needs", ALONE, ids=QuantizedNeeds._fields)
@pytest.mark.parametrize("shape", [(131, 40), (130, 128)], ids=str)
def test_any_output_alone(shape: tuple[int, int], needs: QuantizedNeeds) -> None:
    p = problem(*shape, torch.bfloat16)
    everything = composed_backward(p, GPT_OSS, torch.bfloat16)
    names = dict(zip(needs._fields, [(0, 1), (2, 3), (4,), (5, 6), (7,), (8,)], strict=True))
    wanted = {place for name, places in names.items() if getattr(needs, name) for place in places}
    found = backward(p, GPT_OSS, needs, torch.bfloat16)
    assert_same([found[i] for i in wanted], [everything[i] for i in wanted])
    assert all(tensor.shape == (0,) for i, tensor in enumerate(found) if i not in wanted)


@ACTIVATIONS
def test_the_activation_needs_no_gradient(activation: Any) -> None:
    p = problem(130, 70)
    needs = QuantizedNeeds(False, False, False, True, True, False)
    expected = backward(p, activation)
    found = backward(p, activation, needs, with_grad=False)
    assert_same(found[5:8], expected[5:8])


def test_the_preactivations_are_kept_only_where_asked() -> None:
    p = problem(9, 40, torch.bfloat16)
    data, scale, *absent = forward(p, SWIGLU, keep=False)
    assert_same((data, scale), forward(p, SWIGLU)[:2])
    assert [(t.shape, t.dtype) for t in absent] == [((0,), torch.float8_e4m3fn), ((0,), torch.float32)]


def test_row_terms_are_added_to_the_gradient_of_the_weights() -> None:
    p = problem(20, 33)
    with_terms, without = backward(p, SWIGLU).weights, backward(p, SWIGLU, with_terms=False).weights
    live = p.inv_map >= 0
    expected = torch.zeros(p.weights.numel()).index_put((p.inv_map[live].long(),), p.row_terms[live])
    torch.testing.assert_close(with_terms - without, expected.view_as(p.weights), rtol=1e-4, atol=1e-5)
    unused = torch.ones(p.weights.numel(), dtype=torch.bool)
    unused[p.inv_map[live].long()] = False
    assert with_terms.view(-1)[unused].eq(0).all()


# --- float64 ----------------------------------------------------------------------------------------------------------


def check_tiles(scaled: tuple[Tensor, Tensor], expected: Tensor, eager: Tensor, eps: float) -> None:
    """Each number is within half a step of e4m3 from float64's, and the budget of float32; scales are the smallest."""
    data, scale = scaled
    wide = scale.double().repeat_interleave(128, 1)[:, : data.shape[1]]
    assert torch.equal(scale.log2(), scale.log2().round())
    slack = accuracy_budget(torch.float32, accuracy_error(eager, expected)) * expected.abs().max()
    largest = torch.nn.functional.pad(expected.abs(), (0, -data.shape[1] % 128)).unflatten(1, (-1, 128)).amax(2)
    assert (largest - slack <= 448.0 * scale).all()
    assert ((largest + slack).clamp(min=eps) > 224.0 * scale).all()
    inside = (expected.abs() / wide).clamp(max=448.0)
    step = torch.exp2(inside.clamp(min=2.0**-6).log2().floor() - 3)
    error = (data.double() * wide - expected).abs()
    assert (error <= step / 2 * wide + 1.01 * slack).all()


class Exact(NamedTuple):
    activation: Tensor
    grad: Tensor
    activated: Tensor
    weights: Tensor


def definition(preact: Tensor, p: Problem, activation: Any, dtype: torch.dtype) -> Exact:
    """Plain PyTorch and its autograd, in `dtype`."""
    live, slot = (p.inv_map >= 0)[:, None], p.inv_map.long().clamp(min=0)
    preact, grad = (torch.where(live, tensor.to(dtype), 0.0) for tensor in (preact, p.grad))
    preact.requires_grad_()
    weight = p.weights.view(-1)[slot].to(dtype).requires_grad_()
    value = glu(preact, Activation(*activation))
    activated = value * torch.where(live, weight[:, None], 0.0)
    of_preact, of_weight = torch.autograd.grad(activated, (preact, weight), grad)
    rows = p.inv_map >= 0
    weights = torch.zeros(p.weights.numel(), dtype=dtype)
    weights[slot[rows]] = (of_weight + p.row_terms.to(dtype))[rows]
    return Exact(value.detach(), of_preact, activated.detach(), weights.view_as(p.weights))


@ACTIVATIONS
@pytest.mark.parametrize("shape", [(130, 7), (129, 130), (40, 300)], ids=str)
def test_values_against_float64(shape: tuple[int, int], activation: Any) -> None:
    p = problem(*shape)
    found = backward(p, activation)
    kept = dequantised(*p.kept)
    exact, eager = (definition(kept, p, activation, dtype) for dtype in (torch.float64, torch.float32))
    assert_as_accurate(found.wide, exact.grad, eager.grad)
    assert_as_accurate(found.activated_wide, exact.activated, eager.activated)
    assert_as_accurate(found.weights, exact.weights, eager.weights)
    check_tiles((found.data, found.scale), exact.grad, eager.grad, GRAD_EPS)
    check_tiles((found.data_t, found.scale_t), exact.grad.t(), eager.grad.t(), GRAD_EPS)
    check_tiles((found.activated_data_t, found.activated_scale_t), exact.activated.t(), eager.activated.t(), EPS)
    exact, eager = (definition(p.preact, p, activation, dtype) for dtype in (torch.float64, torch.float32))
    check_tiles(forward(p, activation)[:2], exact.activation, eager.activation, EPS)


@ACTIVATIONS
def test_the_definition_in_words_of_pytorch(activation: Any) -> None:
    """Its float32 values are as good; its tiles are those of its values."""
    p = problem(130, 70, torch.bfloat16)
    kept = dequantised(*p.kept)
    exact, eager = (definition(kept, p, activation, dtype) for dtype in (torch.float64, torch.float32))
    arguments = (*p.kept, *p[1:], *activation, *EVERYTHING, EPS, GRAD_EPS, torch.float32)
    found = glu_reference.moe_glu_backward_quantize(*arguments)
    assert_as_accurate(found.wide, exact.grad, eager.grad)
    assert_as_accurate(found.activated_wide, exact.activated, eager.activated)
    assert_as_accurate(found.weights, exact.weights, eager.weights)
    tiled = (*tiles(found.wide, GRAD_EPS), *turned_tiles(found.wide, GRAD_EPS))
    assert_same(found[:4], tiled)
    assert_same(found[5:7], turned_tiles(found.activated_wide, EPS))
    quantised = glu_reference.moe_glu_quantize(p.preact, p.inv_map, *activation, True, EPS)
    assert_same(quantised[2:], forward(p, activation)[2:])
    plain = definition(p.preact, p, activation, torch.float64).activation
    check_tiles(quantised[:2], plain, definition(p.preact, p, activation, torch.float32).activation, EPS)


# --- rows with anything in them ---------------------------------------------------------------------------------------


def one_row(gate: float, up: float, grad: float, width: int = 2) -> Problem:
    preact = torch.tensor([[gate] * width + [up] * width])
    zero = torch.zeros(1)
    return Problem(preact, torch.full((1, width), grad), torch.zeros(1, dtype=torch.int32), torch.ones(1, 1), zero)


def test_padding_is_zeros_with_the_scale_of_eps() -> None:
    p = problem(130, 70)._replace(inv_map=torch.full((130,), -1, dtype=torch.int32))
    p = p._replace(preact=torch.full_like(p.preact, NAN), grad=torch.full_like(p.grad, NAN))
    found = backward(p, SWIGLU)
    for data in (found.data, found.data_t, found.activated_data_t, *forward(p, SWIGLU)[::2]):
        assert bits(data).eq(0).all()
    assert found.scale.unique().tolist() == found.scale_t.unique().tolist() == [2.0**-108]  # 448 * 2^-108 >= 1e-30
    for scale in (found.activated_scale_t, *forward(p, SWIGLU)[1::2]):
        assert scale.unique().tolist() == [2.0**-48]
    for values in (found.wide, found.activated_wide, found.weights):
        assert values.eq(0).all()


def test_a_tile_below_eps_gets_its_scale() -> None:
    p = one_row(1.0, 1e-3, 1e-3)
    assert forward(p, SWIGLU, eps=1.0)[1].item() == 2.0**-8
    assert backward(one_row(1.0, 1.0, 0.0), SWIGLU).scale.item() == 2.0**-108


@pytest.mark.parametrize("size", [1e-25, 1e-10, 1e10, 1e25])
def test_huge_and_tiny_gradients_keep_their_precision(size: float) -> None:
    p = problem(130, 130, padding=False)
    p = p._replace(grad=p.grad.sign() * size, weights=torch.ones_like(p.weights))
    found = backward(p, SWIGLU)
    for scaled, values in (((found.data, found.scale), found.wide), ((found.data_t, found.scale_t), found.wide.t())):
        assert values.abs().max() > size
        largest = torch.nn.functional.pad(values.abs(), (0, -values.shape[1] % 128)).unflatten(1, (-1, 128)).amax(2)
        assert (scaled[1] <= 2 * largest / 448).all()
        assert ((dequantised(*scaled) - values).abs() <= values.abs() / 16 + largest.max() * 2.0**-16).all()


def test_what_overflows_is_a_tile_of_nan() -> None:
    p = one_row(3e38, 3e38, 1.0)
    data, scale, _, kept_scale = forward(p, SWIGLU)
    assert scale.isnan().all()
    assert bits(data).eq(0x7F).all()
    assert kept_scale.isfinite().all()
    found = backward(p, SWIGLU)
    assert found.activated_wide.isposinf().all()
    assert found.activated_scale_t.isnan().all()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_bad_number_spoils_its_tiles_and_no_others(bad: float, interleaved: bool) -> None:
    """A tile of [R, 2I] may hold gates and ups: here the second of three holds both."""
    activation = (False, 1.0, 1.0, interleaved)
    p = problem(140, 192, padding=False)
    good, clean = backward(p, activation), forward(p, activation)
    preact = p.preact.clone()
    preact[130, 2 * 150 if interleaved else 150] = bad
    found = forward(p._replace(preact=preact), activation)
    assert found[1].isnan().nonzero().tolist() == [[130, 1]]
    assert found[3].isnan().nonzero().tolist() == [[130, 2 if interleaved else 1]]
    for a, b in zip(found, clean, strict=True):
        assert torch.equal(bits(a[:130]), bits(b[:130]))
    spoiled = backward(p._replace(preact=preact), activation)
    # In halves: lost ups 0 to 63 spoil the gradients of their gates; lost gates 128 to 191 those of their ups as well.
    columns = [*range(256, 384)] if interleaved else [*range(64), *range(128, 192), *range(320, 384)]
    assert spoiled.wide.isnan().nonzero().tolist() == [[130, column] for column in columns]
    assert spoiled.scale.isnan().nonzero().tolist() == [[130, i] for i in ([2] if interleaved else [0, 1, 2])]
    assert spoiled.scale_t.isnan().nonzero().tolist() == [[column, 1] for column in columns]
    assert bits(spoiled.data_t)[columns, 128:].eq(0x7F).all()
    assert torch.equal(bits(spoiled.data_t[:, :128]), bits(good.data_t[:, :128]))
    assert torch.equal(bits(spoiled.data[:130]), bits(good.data[:130]))


def test_every_size_of_numbers_composes() -> None:
    p = problem(150, 96)
    p = p._replace(preact=p.preact * torch.exp2(torch.randint(-60, 120, (150, 1)).float()))
    p = p._replace(grad=p.grad * torch.exp2(torch.randint(-120, 100, (150, 1)).float()))
    for activation in (SWIGLU, GPT_OSS):
        assert_same(forward(p, activation), composed_forward(p, activation))
        assert_same(backward(p, activation), composed_backward(p, activation, torch.float32))


# --- shapes, layouts, threads -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "width"), [(0, 7), (0, 128), (4, 0), (0, 0)])
def test_empty(rows: int, width: int) -> None:
    p = problem(rows, width, torch.bfloat16, padding=False)
    found = backward(p, SWIGLU, dtype=torch.bfloat16)
    assert found.data.shape == found.wide.shape == (rows, 2 * width)
    assert found.data_t.shape == (2 * width, rows)
    assert found.activated_data_t.shape == (width, rows)
    assert found.weights.shape == p.weights.shape
    assert [tuple(t.shape) for t in forward(p, SWIGLU)][::2] == [(rows, width), (rows, 2 * width)]
    if width == 0:
        expected = torch.zeros(p.weights.numel()).index_put((p.inv_map.long(),), p.row_terms)
        assert torch.equal(found.weights.view(-1), expected)


def test_inputs_of_any_layout() -> None:
    p = problem(70, 150, torch.bfloat16)
    expected = forward(p, CLAMPED), backward(p, CLAMPED)
    apart = Problem(
        p.preact.t().contiguous().t(),
        torch.nn.functional.pad(p.grad, (3, 5))[:, 3:-5],
        p.inv_map.repeat_interleave(2)[::2],
        p.weights.t().contiguous().t(),
        p.row_terms.repeat_interleave(3)[1::3],
    )
    assert_same(forward(apart, CLAMPED), expected[0])
    data, scale = p.kept
    larger = torch.zeros(75, 310, dtype=torch.uint8).view(data.dtype)
    larger.view(torch.uint8)[2:72, 5:305] = data.view(torch.uint8)
    turned = data.view(torch.uint8).t().contiguous().t().view(data.dtype)
    for kept in ((larger[2:72, 5:305], scale.contiguous()), (turned, torch.nn.functional.pad(scale, (1, 2))[:, 1:-2])):
        assert_same(backward(apart, CLAMPED, kept=kept), expected[1])


def test_one_gradient_for_all_rows() -> None:
    p = problem(20, 30)
    row = p.grad[:1].nan_to_num(1.0)
    assert_same(
        backward(p._replace(grad=row.expand(20, 30)), SWIGLU), backward(p._replace(grad=row.repeat(20, 1)), SWIGLU)
    )


@pytest.mark.parametrize("needs", [EVERYTHING, ALONE[0]], ids=["everything", "rows"])
def test_threads_change_nothing(needs: QuantizedNeeds) -> None:
    """Nor does it matter which rows come after."""
    p = problem(900, 130, torch.bfloat16)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append((forward(p, GPT_OSS), backward(p, GPT_OSS, needs, torch.bfloat16)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert_same(other[0], results[0][0])
        assert_same(other[1], results[0][1])
    first = Problem(p.preact[:256], p.grad[:256], p.inv_map[:256], p.weights, p.row_terms[:256])
    assert_same([t.contiguous() for t in forward(first, GPT_OSS)], [t[:256].contiguous() for t in results[0][0]])


def test_a_slot_that_does_not_exist() -> None:
    p = problem(300, 20, padding=False)
    p.inv_map[[140, 270]] = p.weights.numel()
    for needs in (EVERYTHING, ALONE[0]):
        with pytest.raises(
            ValueError, match=r"moe_glu_backward_quantize: inv_map\[140\] must be < T \* K = 604.*, got 604"
        ):
            backward(p, SWIGLU, needs)


# --- instruction sets -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_every_instruction_set(isa: str) -> None:
    """In a process that is told to use less than the processor has."""
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            __file__,
            "-k",
            "composition or float64",
        ],
        env=dict(os.environ, GRPO_KERNELS_ISA=isa, OMP_WAIT_POLICY="passive"),
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:]
