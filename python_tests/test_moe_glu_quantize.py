"""The activation that quantises: the bits of moe_glu and fp8_quantize one after the other, in float32 between."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_kernels.moe_experts.ops import QuantizedNeeds
from python_tests.glu_problems import (
    ACTIVATIONS,
    ALONE,
    CLAMPED,
    EVERYTHING,
    GPT_OSS,
    SWIGLU,
    Problem,
    assert_same,
    backward,
    composed_backward,
    composed_forward,
    forward,
    problem,
)

pytestmark = pytest.mark.usefixtures("native_cpu")

SHAPES = pytest.mark.parametrize(
    "shape", [(5, 1), (130, 7), (127, 64), (7, 96), (256, 128), (129, 130), (6, 300), (128, 257)], ids=str
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


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
    files = [str(Path(__file__).with_name(f"test_moe_glu_quantize{end}.py")) for end in ("", "_values")]
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            *files,
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
