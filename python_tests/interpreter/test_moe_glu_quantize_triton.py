"""The activation that quantises, run by Triton's interpreter on CPU tensors: the bits of the kernels that it fuses.

The interpreter truncates float32 to bfloat16 where a GPU rounds: wide results are float32 or float16 here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_kernels.moe_experts import glu_reference, ops
from grpo_kernels.moe_experts.ops import QuantizedGradients, QuantizedNeeds
from grpo_kernels.testing import guard_input, guarded_allocations, poisoned_allocations
from python_tests.glu_problems import (
    ACTIVATIONS,
    ALONE,
    CLAMPED,
    EPS,
    EVERYTHING,
    GPT_OSS,
    GRAD_EPS,
    INF,
    NAN,
    SWIGLU,
    TURNED,
    Problem,
    assert_same,
    dequantised,
    problem,
    tiles,
    turned_tiles,
)

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.usefixtures("triton_on_cpu"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]

# 96, 130: a tile of gates and ups; 128: none; 300: tiles of ups with those of two tiles of gates
WIDTHS = pytest.mark.parametrize("width", [1, 64, 96, 128, 130, 300])
DTYPES = {64: torch.float16, 128: torch.bfloat16}


def forward(p: Problem, activation: Any, keep: bool = True) -> tuple[Tensor, ...]:
    with guarded_allocations(), poisoned_allocations():
        return ops.moe_glu_quantize(guard_input(p.preact), guard_input(p.inv_map), *activation, keep, EPS, "triton")


def backward(
    p: Problem,
    activation: Any,
    needs: QuantizedNeeds = EVERYTHING,
    dtype: torch.dtype = torch.float32,
    terms: bool = True,
) -> QuantizedGradients:
    data, scale = p.kept
    with guarded_allocations(), poisoned_allocations():
        found = ops.moe_glu_backward_quantize(
            guard_input(data.view(torch.uint8)).view(data.dtype),
            guard_input(scale),
            guard_input(p.grad) if needs.grad else None,
            *map(guard_input, (p.inv_map, p.weights)),
            guard_input(p.row_terms) if terms else None,
            *activation,
            *needs,
            EPS,
            GRAD_EPS,
            dtype,
            "triton",
        )
    return QuantizedGradients(*found)


def composed(p: Problem, activation: Any, dtype: torch.dtype = torch.float32) -> QuantizedGradients:
    """fp8_dequantize and Triton's moe_glu_backward of float32, then fp8_quantize."""
    operands = (dequantised(*p.kept), p.grad.float(), p.inv_map, p.weights, p.row_terms)
    grad, activated, weights = ops.moe_glu_backward(*operands, *activation, True, True, True, "triton")
    return QuantizedGradients(
        *tiles(grad, GRAD_EPS),
        *turned_tiles(grad, GRAD_EPS),
        grad.to(dtype),
        *turned_tiles(activated, EPS),
        activated.to(dtype),
        weights,
    )


@WIDTHS
@ACTIVATIONS
def test_the_bits_of_the_forwards_kernels(activation: Any, width: int) -> None:
    p = problem(10, width, DTYPES.get(width, torch.float32))
    activated = ops.moe_glu(p.preact.float(), p.inv_map, None, *activation, "triton")
    kept = tiles(p.preact.float().where((p.inv_map >= 0)[:, None], 0.0), EPS)
    assert_same(forward(p, activation), (*tiles(activated, EPS), *kept))


@WIDTHS
@ACTIVATIONS
def test_the_bits_of_the_backwards_kernels(activation: Any, width: int) -> None:
    """Of interleaved pairs half as many products add up at a time: those sums have bits of their own."""
    dtype = torch.float16 if width == 64 else torch.float32
    p = problem(10, width, DTYPES.get(width, torch.float32))
    same = 8 if activation[-1] and width > 64 else 9
    assert_same(backward(p, activation, dtype=dtype)[:same], composed(p, activation, dtype)[:same])


@pytest.mark.parametrize("width", [65, 200])
def test_nan_stays_in_its_tile(width: int) -> None:
    """In the last one but one of the pre-activations, of which the last has a part of the width alone."""
    for activation in (SWIGLU, TURNED):
        p = problem(3, width, padding=False)
        p.preact[0, (2 * width - 1) // 128 * 128 - 1] = float("nan")
        found, expected = backward(p, activation, terms=False), composed(p, activation)
        assert_same(found[:8], expected[:8])
        assert found.scale.isnan().any(1).tolist() == [True, False, False]


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -1.0, 0.0])
def test_weights_of_any_kind(weight: float) -> None:
    """A row's weight comes last: what a clamp stops is 0 times the weight, as in the definition."""
    p = problem(3, 70, padding=False)
    p.preact[:] *= 10
    p.weights[:] = weight
    for activation in (CLAMPED, GPT_OSS):
        found = backward(p, activation, terms=False)
        assert_same(found[:8], composed(p, activation)[:8])
        arguments = (*p.kept, p.grad, p.inv_map, p.weights, None, *activation, *EVERYTHING, EPS, GRAD_EPS)
        defined = glu_reference.moe_glu_backward_quantize(*arguments, torch.float32)
        assert torch.equal(found.wide.isnan(), defined.wide.isnan())
        assert torch.equal(found.wide == 0, defined.wide == 0)
        assert torch.equal(found.scale.isnan(), defined.scale.isnan())


def test_every_product_is_in_the_gradient_of_the_weights() -> None:
    """One in each row: no order of adding changes the sum."""
    for activation in (SWIGLU, GPT_OSS):
        p = problem(10, 130, padding=False)
        p = p._replace(grad=torch.zeros(10, 130).scatter(1, torch.arange(129, 0, -14)[:, None], 3.0))
        found = backward(p, activation, ALONE[-1]).weights
        assert found.flatten()[p.inv_map.long()].ne(0).all()
        assert torch.equal(found, composed(p, activation).weights)


@pytest.mark.parametrize("rows", [128, 131])
@pytest.mark.parametrize("activation", [SWIGLU, GPT_OSS], ids=str)
def test_transposes_of_whole_tiles_and_of_a_narrower_last(activation: Any, rows: int) -> None:
    """At a width that is one program's and the beginning of another's."""
    p = problem(rows, 40)
    needs = QuantizedNeeds(False, True, False, True, False, False)
    found, expected = backward(p, activation, needs), composed(p, activation)
    assert_same((*found[2:4], *found[5:7]), (*expected[2:4], *expected[5:7]))


@pytest.mark.parametrize("needs", ALONE, ids=QuantizedNeeds._fields)
@pytest.mark.parametrize("activation", [SWIGLU, GPT_OSS], ids=str)
def test_any_output_alone_has_the_bits_of_all(activation: Any, needs: QuantizedNeeds) -> None:
    """s * A without a gradient of the activation."""
    p = problem(5, 140)
    everything, found = backward(p, activation), backward(p, activation, needs)
    names = dict(zip(needs._fields, [(0, 1), (2, 3), (4,), (5, 6), (7,), (8,)], strict=True))
    wanted = {place for name, places in names.items() if getattr(needs, name) for place in places}
    assert_same([found[i] for i in wanted], [everything[i] for i in wanted])
    assert all(tensor.shape == (0,) for i, tensor in enumerate(found) if i not in wanted)


def test_what_is_not_asked_for() -> None:
    p = problem(9, 140)
    for activation in (SWIGLU, TURNED):
        data, scale, *absent = forward(p, activation, keep=False)
        assert_same((data, scale), forward(p, activation)[:2])
        assert [tensor.shape for tensor in absent] == [(0,), (0,)]
    nothing = backward(p, SWIGLU, QuantizedNeeds(False, False, False, False, False, False))
    assert [tensor.shape for tensor in nothing] == [(0,)] * 9
    without = backward(p, SWIGLU, ALONE[-1], terms=False).weights
    zeros = p._replace(row_terms=torch.zeros(9))
    assert torch.equal(without, backward(zeros, SWIGLU, ALONE[-1]).weights)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("interleaved", [False, True])
def test_a_bad_number_spoils_its_tiles_and_no_others(bad: float, interleaved: bool) -> None:
    activation = (False, 1.0, 1.0, interleaved)
    clean = problem(5, 160, padding=False)
    preact, grad = clean.preact.clone(), clean.grad.clone()
    preact[1, 300], grad[3, 159] = bad, bad
    p = clean._replace(preact=preact, grad=grad)
    # column 300: the up of activation 140, or the gate of activation 150; activation 159: columns 159 and 319, or 318 and 319
    found = forward(p, activation)
    assert [scale.isnan().nonzero().tolist() for scale in (found[1], found[3])] == [[[1, 1]], [[1, 2]]]
    whole, dirty = backward(clean, activation), backward(p._replace(preact=clean.preact), activation)
    assert dirty.scale.isnan().nonzero().tolist() == ([[3, 2]] if interleaved else [[3, 1], [3, 2]])
    columns = [318, 319] if interleaved else [159, 319]
    assert dirty.scale_t.isnan().nonzero().tolist() == [[column, 0] for column in columns]
    fine = ~dirty.scale.isnan().repeat_interleave(128, 1)[:, :320]
    for place in ("data", "wide"):
        a, b = getattr(dirty, place), getattr(whole, place)
        assert torch.equal(a.float()[fine], b.float()[fine])
    assert torch.equal(dirty.activated_wide, whole.activated_wide)


@ACTIVATIONS
def test_the_definition(activation: Any) -> None:
    """The shapes, the layouts and the padding of the definition; its values to the codes' precision, and where they are
    exact, its bits."""
    p = problem(5, 130)
    for found, expected in (
        (forward(p, activation), glu_reference.moe_glu_quantize(p.preact, p.inv_map, *activation, True, EPS)),
        (
            backward(p, activation),
            glu_reference.moe_glu_backward_quantize(
                *p.kept, p.grad, p.inv_map, p.weights, p.row_terms, *activation, *EVERYTHING, EPS, GRAD_EPS,
                torch.float32,
            ),
        ),
    ):  # fmt: skip
        layouts = [[(t.shape, t.stride(), t.dtype) for t in of] for of in (found, expected)]
        assert layouts[0] == layouts[1]
        dead = p.inv_map < 0
        for a, b in zip(found, expected, strict=True):
            if len(a) == len(dead):
                assert torch.equal(a[dead].float(), b[dead].float())
    found = forward(p, activation)[2:]
    assert_same(found, glu_reference.moe_glu_quantize(p.preact, p.inv_map, *activation, True, EPS)[2:])
    zeros = p._replace(preact=torch.zeros(5, 260))
    expected = glu_reference.moe_glu_quantize(zeros.preact, p.inv_map, *activation, True, EPS)
    assert_same(forward(zeros, activation), expected)


@pytest.mark.parametrize(("rows", "width"), [(0, 40), (3, 0), (0, 0)])
def test_empty(rows: int, width: int) -> None:
    p = problem(rows, width)
    for tensors in (forward(p, SWIGLU), backward(p, GPT_OSS)):
        for tensor in tensors:
            assert tensor.numel() == 0 or not tensor.any()


@pytest.mark.parametrize("activation", [SWIGLU, GPT_OSS], ids=str)
def test_slots_that_are_not_there_are_padding(activation: Any) -> None:
    """inv_map's entries T * K and beyond, in the backward: no weight is read and no gradient written there."""
    p = problem(9, 40, padding=False)
    far, padding = p.inv_map.clone(), p.inv_map.clone()
    far[2], far[5], far[8] = p.weights.numel(), 2**30, 2**31 - 1
    padding[[2, 5, 8]] = -1
    assert_same(backward(p._replace(inv_map=far), activation), backward(p._replace(inv_map=padding), activation))


def test_rows_alone_have_the_bits_of_many() -> None:
    for activation in (SWIGLU, GPT_OSS):
        p = problem(12, 130, padding=False)
        part = p._replace(preact=p.preact[9:], grad=p.grad[9:], inv_map=p.inv_map[9:], row_terms=p.row_terms[9:])
        needs = EVERYTHING._replace(columns=False, activated_columns=False)
        for whole, alone in ((forward(p, activation), forward(part, activation)),
                             (backward(p, activation, needs), backward(part, activation, needs))):  # fmt: skip
            for a, b in zip(whole, alone, strict=True):
                if len(a) == 12:
                    assert torch.equal(a[9:].float(), b.float())
        slots = p.inv_map[9:].long()
        weights = [backward(of, activation, needs).weights.flatten()[slots] for of in (p, part)]
        assert torch.equal(*weights)


def test_views() -> None:
    """Operands of any layout, and an odd offset."""
    p = problem(6, 70, padding=False)
    wide = torch.empty(6, 2, 140)
    wide[:, 1] = p.preact
    flat = torch.empty(1 + 6 * 140)
    flat[1:] = p.preact.flatten()
    for activation in (SWIGLU, GPT_OSS):
        expected = forward(p, activation)
        for preact in (wide[:, 1], p.preact.t().contiguous().t(), flat[1:].view(6, 140)):
            assert_same(forward(p._replace(preact=preact), activation), expected)
        data, scale = p.kept
        arguments = (p.grad.t().contiguous().t(), p.inv_map, p.weights.t().contiguous().t(), p.row_terms)
        found = ops.moe_glu_backward_quantize(
            data.t().contiguous().t(), scale.contiguous(), *arguments, *activation, *EVERYTHING, EPS, GRAD_EPS,
            torch.float32, "triton",
        )  # fmt: skip
        assert_same(found, backward(p, activation))
