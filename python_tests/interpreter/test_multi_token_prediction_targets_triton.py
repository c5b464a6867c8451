"""The Triton kernel of mtp_targets, run by Triton's interpreter on CPU tensors."""

from __future__ import annotations

import pytest
import torch

from grpo_kernels.multi_token_prediction import ops
from grpo_kernels.multi_token_prediction._kernels_triton import launch_config
from grpo_kernels.testing import guard_input, guarded_allocations, poisoned_allocations
from python_tests.test_multi_token_prediction_targets import LEAST, MOST, assert_targets, by_loop, problem

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("rows", [0, 1, 2, 17, 131, 300])
def test_every_option_against_the_loop(rows: int) -> None:
    for seed in range(8):
        assert_targets(problem(seed, rows), "triton")


@pytest.mark.parametrize("shift", [1, 130, 2**62])
def test_one_document_over_several_programs(shift: int) -> None:
    ids = torch.arange(300, dtype=torch.int32)
    for positions, length in ((ids, 0), (None, 0), (None, 150), (ids % 128, 0)):
        assert_targets((ids, positions, None, 2, shift, length, 5), "triton")


def test_positions_do_not_wrap() -> None:
    positions = torch.tensor([MOST - 1, MOST, LEAST, LEAST + 1, -1, 0, MOST])
    assert_targets((torch.arange(7), positions, None, 3, 1, 0, -1), "triton")
    assert_targets((torch.arange(7), positions, None, 3, 0, 2**62, -1), "triton")


def test_strided_inputs() -> None:
    columns = torch.arange(128).view(64, 2)
    arguments = (columns[::2, 1], (columns[:, 0] // 2 % 10)[::2], (columns[:, 0] % 3 > 0)[::2], 3, 1, 9, 3)
    assert_targets(arguments, "triton")


@pytest.mark.parametrize("rows", [1, 127, 128, 129])
def test_nothing_outside_is_touched(rows: int) -> None:
    """Every output is written, and nothing beside the arrays is read or written."""
    ids, positions, mask, *rest = problem(2, rows)
    positions = torch.arange(rows) if positions is None else positions
    mask = torch.ones(rows, dtype=torch.bool) if mask is None else mask
    expected = by_loop(ids, positions, mask, *rest)
    with guarded_allocations(), poisoned_allocations():
        targets, counts = ops.mtp_targets(guard_input(ids), guard_input(positions), guard_input(mask), *rest, "triton")
    assert torch.equal(targets, expected[0])
    assert torch.equal(counts, expected[1])


def test_launch_does_not_depend_on_the_rows() -> None:
    config = launch_config()
    assert config.rows == 32 * config.num_warps
