"""The Triton kernels of moe_permute, run by Triton's interpreter on CPU tensors.

The interpreter truncates float32 to bfloat16 where a GPU rounds: values differ by one unit in the last place.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import grpo_kernels
from grpo_kernels import Permutation, build_permutation, moe_permute, moe_unpermute
from grpo_kernels.moe_permute import ops
from grpo_kernels.testing import assert_as_accurate, guard_input, guarded_allocations, poisoned_allocations
from python_tests.test_moe_permute import check_moves, routes

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("triton_on_cpu")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FAR = (2**30, 2**31 - 1, 10**6)


def permutation_of(ids: Tensor, experts: int, **options: Any) -> Permutation:
    with grpo_kernels.backend("reference"):
        return build_permutation(ids, experts, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [1, 63, 64, 500, 1031, 2064])
def test_moves_against_float64(hidden: int, dtype: torch.dtype) -> None:
    """Rows of one program and of several, aligned ones and others, one warp to four."""
    check_moves(dtype, hidden, 6, 3, alignment=4)


@pytest.mark.parametrize(
    "options", [{}, {"alignment": 128}, {"expert_range": (2, 4)}, {"expert_range": (6, 6)}], ids=str
)
@pytest.mark.parametrize(("tokens", "top_k"), [(0, 2), (1, 1), (7, 1), (3, 12)])
def test_moves_of_every_map(tokens: int, top_k: int, options: dict[str, Any]) -> None:
    """Fewer slots than a program works on together, and more; rows of which most are padding."""
    check_moves(torch.float16, 32, tokens, top_k, **options)


def test_without_weights_rows_are_added() -> None:
    permutation = permutation_of(routes(5, 3, 4), 4, alignment=8)
    y = torch.randn(permutation.inv_map.shape[0], 40, requires_grad=True)
    upstream = torch.randn(5, 40)
    plain = moe_unpermute(y, permutation)
    assert torch.equal(plain, moe_unpermute(y, permutation, torch.ones(5, 3)))
    assert torch.equal(torch.autograd.grad(plain, y, upstream)[0], moe_permute(upstream, permutation))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_with_their_weights(dtype: torch.dtype) -> None:
    """The gradient of the rows where the weights want none: the map with weights."""
    permutation = permutation_of(routes(5, 3, 4), 4, alignment=8)
    live = permutation.inv_map >= 0
    x, weights = torch.randn(5, 72).to(dtype), torch.rand(5, 3)
    rows = ops.moe_permute(x, permutation.row_id_map, permutation.inv_map, weights, "triton")
    slots = permutation.inv_map[live].long()
    expected = x.double()[slots // 3] * weights.double().view(-1)[slots, None]
    assert rows[~live].count_nonzero() == 0
    assert_as_accurate(rows[live], expected, expected.float())


def test_views_and_addresses_that_are_not_aligned() -> None:
    """The values are those of dense rows, bit for bit; only sums of products may be taken in another order."""
    permutation = permutation_of(routes(4, 2, 3, 0.0), 3)
    base, rows = torch.randn(4, 70), torch.randn(8, 70)
    weights = torch.rand(4, 2, requires_grad=True)
    for columns in (slice(0, 64), slice(1, 65), slice(3, 66)):
        x, y = base[:, columns], rows[:, columns]
        assert torch.equal(moe_permute(x, permutation), moe_permute(x.contiguous(), permutation))
        assert torch.equal(moe_unpermute(y, permutation, weights), moe_unpermute(y.contiguous(), permutation, weights))
        (gradient,) = torch.autograd.grad(moe_unpermute(y, permutation, weights), weights, x)
        products = [
            (x.to(d)[:, None] * y.to(d)[permutation.row_id_map]).sum(-1) for d in (torch.float64, torch.float32)
        ]
        assert_as_accurate(gradient, *products)
    expanded = torch.randn(1, 64).expand(4, 64)
    assert torch.equal(moe_permute(expanded, permutation), expanded[:1].expand(8, 64))


def test_a_token_does_not_depend_on_the_others() -> None:
    ids = routes(6, 3, 4, 0.0)
    whole, alone = permutation_of(ids, 4), permutation_of(ids[2:3], 4)
    y, weights, upstream = torch.randn(6, 3, 80), torch.rand(6, 3), torch.randn(6, 80)

    def run(permutation: Permutation, tokens: slice) -> list[Tensor]:
        rows = y[tokens].reshape(-1, 80)[permutation.inv_map.long()].requires_grad_()
        leaf = weights[tokens].clone().requires_grad_()
        out = moe_unpermute(rows, permutation, leaf)
        grad_y, grad_weights = torch.autograd.grad(out, (rows, leaf), upstream[tokens])
        return [out.detach(), grad_weights, grad_y[permutation.row_id_map.long()]]

    for all_of_them, one in zip(run(whole, slice(None)), run(alone, slice(2, 3)), strict=True):
        assert torch.equal(all_of_them[2], one[0])


@pytest.mark.parametrize("hidden", [64, 1031])
def test_nothing_outside_the_tensors_is_touched(hidden: int) -> None:
    """Inputs lie between NaN, allocations between bands that are checked; no row that is padding is read."""
    permutation = permutation_of(routes(5, 3, 4), 4, alignment=4)
    maps = [guard_input(tensor) for tensor in permutation[:2]]
    rows, dead = permutation.inv_map.shape[0], permutation.inv_map < 0
    x, y, weights = torch.randn(5, hidden), torch.randn(rows, hidden), torch.rand(5, 3)
    y[dead] = float("nan")

    def run(*inputs: Tensor) -> list[Tensor]:
        a, b, w = inputs
        return [
            ops.moe_permute(a, *maps, w, "triton"),
            ops.moe_unpermute(b, maps[0], w, "triton"),
            *ops.moe_unpermute_backward(a, b, *maps, w, "triton"),
        ]

    expected = run(x, y, weights)
    with guarded_allocations(), poisoned_allocations():
        actual = run(*map(guard_input, (x, y, weights)))
    for a, b in zip(actual, expected, strict=True):
        assert b.isfinite().all()
        assert torch.equal(a, b)


def test_launch_config_depends_on_the_row_alone() -> None:
    from grpo_kernels.moe_permute._kernels_triton import launch_config

    assert launch_config(7168, 8, 2) == (128, 8, 8, True, 4)
    assert launch_config(2048, 22, 4) == (128, 4, 8, True, 4)
    assert launch_config(256, 1, 2) == (32, 8, 1, True, 1)
    assert launch_config(257, 3, 2, aligned=False) == (64, 8, 4, False, 2)
    assert launch_config(7168, 8, 2, aligned=False) == (128, 8, 4, False, 4)
    assert launch_config(0, 0, 2) == (32, 8, 1, True, 1)
    for hidden in (1, 100, 512, 2880, 65536):
        for top_k in (1, 2, 5, 8, 32):
            for size in (2, 4):
                config = launch_config(hidden, top_k, size)
                assert config.lanes == 32 * config.num_warps <= 128
                assert config.width * size == 16  # bytes a thread
                assert config.slots <= 8 < 2 * max(config.slots, top_k) or config.slots >= top_k


@pytest.mark.parametrize("far", [(), FAR], ids=["the next", "far ones too"])
@pytest.mark.parametrize("hidden", [64, 1031])
def test_entries_beyond_the_tensors_are_as_minus_one(hidden: int, far: tuple[int, ...]) -> None:
    """No row of experts R, no slot T * K: nothing is read or written there, and the result is that of -1. Once without other padding, which
    would make programs look at every row."""
    permutation = permutation_of(routes(5, 3, 4, 0.0), 4, alignment=4 if far else 1)
    rows, slots = permutation.inv_map.shape[0], 15
    x, y, weights = torch.randn(5, hidden), torch.randn(rows, hidden), torch.rand(5, 3)
    taken = (permutation.row_id_map >= 0).nonzero()[::2]

    def run(entries: tuple[int, ...], last_row: int, last_slot: int) -> list[Tensor]:
        row_id_map, inv_map = permutation.row_id_map.clone(), permutation.inv_map.clone()
        for place, (token, k) in enumerate(taken.tolist()):
            inv_map[row_id_map[token, k]] = (*entries, last_slot)[place % (len(entries) + 1)]
            row_id_map[token, k] = (*entries, last_row)[place % (len(entries) + 1)]
        maps = guard_input(row_id_map), guard_input(inv_map)
        with guarded_allocations(), poisoned_allocations():
            a, b, w = map(guard_input, (x, y, weights))
            return [
                ops.moe_permute(a, *maps, None, "triton"),
                ops.moe_permute(a, *maps, w, "triton"),
                ops.moe_unpermute(b, maps[0], None, "triton"),
                ops.moe_unpermute(b, maps[0], w, "triton"),
                *ops.moe_unpermute_backward(a, b, *maps, w, "triton"),
            ]

    for found, expected in zip(run(far, rows, slots), run((-1,) * len(far), -1, -1), strict=True):
        assert expected.isfinite().all()
        assert torch.equal(found, expected)
