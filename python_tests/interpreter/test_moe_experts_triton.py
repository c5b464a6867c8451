"""The Triton kernels of moe_experts, run by Triton's interpreter on CPU tensors; moves and products run on the CPU's own.

The interpreter truncates float32 to bfloat16 where a GPU rounds: bfloat16 results get one unit in the last place.
"""

from __future__ import annotations

import pytest
import torch

import grpo_kernels
from grpo_kernels.moe_experts import ops
from grpo_kernels.testing import (
    accuracy_error,
    assert_as_accurate,
    guard_input,
    guarded_allocations,
)
from python_tests.gpu.devices import assert_agrees, inputs_of, run
from python_tests.moe_problems import Problem
from python_tests.samples import Call
from python_tests.samples import moe_experts as samples
from python_tests.test_moe_experts_training import KINDS, expected_of, numbers

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.usefixtures("triton_on_cpu"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]


@pytest.mark.parametrize("width", [1, 19, 300])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_activation_against_float64(dtype: torch.dtype, kind: str, interleaved: bool, width: int) -> None:
    rows = 21 if width > 1 else 64
    preact, grad = (torch.randn(rows, columns * width).mul(2).to(dtype) for columns in (2, 1))
    inv_map = torch.randperm(2 * rows)[:rows].int()
    inv_map[3::7] = -1
    preact[3::7], grad[3::7] = float("nan"), float("nan")
    weights, options = torch.rand(rows, 2), numbers(kind, interleaved)
    with guarded_allocations():
        guarded = [guard_input(tensor) for tensor in (preact, grad, inv_map, weights)]
        found = [
            ops.moe_glu(guarded[0], guarded[2], None, *options, "triton"),
            *ops.moe_glu_backward(*guarded, None, *options, True, True, True, "triton"),
        ]
    of = (preact, grad, inv_map, weights, kind, interleaved)
    exact, plain = expected_of(*of, torch.float64), expected_of(*of, torch.float32)
    for value, expected, eager in zip(found, exact, plain, strict=True):
        if value.dtype == torch.bfloat16:  # truncated
            assert accuracy_error(value, expected) <= torch.finfo(dtype).eps
        else:
            assert_as_accurate(value, expected, eager)


def test_parts_of_the_backward_have_the_bits_of_all() -> None:
    preact, grad, weights, terms = torch.randn(9, 40), torch.randn(9, 20), torch.rand(5, 2), torch.randn(9)
    inv_map = torch.tensor([4, -1, 0, 9, 3, -1, 1, 2, 8], dtype=torch.int32)
    for interleaved in (False, True):
        options = numbers("clamped", interleaved)
        arguments = (preact, grad, inv_map, weights, terms, *options)
        whole = ops.moe_glu_backward(*arguments, True, True, True, "triton")
        for place in range(3):
            needs = [other == place for other in range(3)]
            part = ops.moe_glu_backward(*arguments, *needs, "triton")
            assert torch.equal(part[place], whole[place])
            others = [value.numel() for value, need in zip(part, needs, strict=True) if not need]
            assert others == [0, 0]
        assert torch.equal(ops.moe_glu(preact, inv_map, weights, *options, "triton"), whole[1])


def test_interleaved_rows_that_begin_between_pairs() -> None:
    """Pairs are loaded as integers of twice the width; a view that begins at an odd element is copied."""
    flat = torch.randn(1 + 6 * 40).half()
    preact, inv_map = flat[1:].view(6, 40), torch.arange(6, dtype=torch.int32)
    options = numbers("swiglu", True)
    found = ops.moe_glu(preact, inv_map, None, *options, "triton")
    assert torch.equal(found, ops.moe_glu(preact.clone(), inv_map, None, *options, "triton"))


@pytest.mark.parametrize("interleaved", [False, True])
def test_slots_that_are_not_there_are_padding(interleaved: bool) -> None:
    """inv_map's entries T * K and beyond: no weight is read and no gradient written there."""
    preact, grad, weights, terms = torch.randn(6, 40), torch.randn(6, 20), torch.rand(5, 2), torch.randn(6)
    far, padding = (
        torch.tensor([4, -1, slot, 9, other, 0], dtype=torch.int32) for slot, other in ((10, 2**30), (-1, -1))
    )
    options = numbers("clamped", interleaved)

    def run(inv_map: torch.Tensor) -> list[torch.Tensor]:
        with guarded_allocations():
            a, g, m, w, t = map(guard_input, (preact, grad, inv_map, weights, terms))
            backward = ops.moe_glu_backward(a, g, m, w, t, *options, True, True, True, "triton")
            return [ops.moe_glu(a, m, w, *options, "triton"), *backward]

    for found, expected in zip(run(far), run(padding), strict=True):
        assert expected.isfinite().all()
        assert torch.equal(found, expected)


@pytest.mark.parametrize("save", ["preact", "input"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_experts_against_float64(dtype: torch.dtype, save: str) -> None:
    problem = Problem.make(dtype, bias=True, activation="clamped_swiglu", swiglu_limit=1.1, interleaved=True)
    problem.assert_accurate(problem.run(save=save, alignment=8))


FLOAT32 = [call for call in samples.CALLS if call.rounds is None]


@pytest.mark.parametrize("call", FLOAT32, ids=lambda call: call.name)
def test_public_calls_agree_with_the_cpu(call: Call) -> None:
    with grpo_kernels.backend("native"):
        expected = run(call, inputs_of(call, "cpu"))
    assert_agrees(call, run(call, inputs_of(call, "cpu")), expected)
