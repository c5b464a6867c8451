"""build_permutation: the CUDA kernels, emulated, against the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import grpo_kernels
from grpo_kernels import Permutation
from python_tests.emulator import ORDERS, emulated
from python_tests.emulator.checks import assert_same_in_every_order

TILE = 1024  # slots that a block takes


def routes(tokens: int, top_k: int, experts: int, kind: str = "random", seed: int = 0) -> Tensor:
    """[T, K] int64, a tenth of them without an expert."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "one":
        return torch.full((tokens, top_k), experts - 1)
    if kind == "few":  # most experts are empty
        return torch.randint(0, experts, (3,), generator=generator)[
            torch.randint(0, 3, (tokens, top_k), generator=generator)
        ]
    ids = torch.randint(0, experts, (tokens, top_k), generator=generator)
    ids[torch.rand(tokens, top_k, generator=generator) < 0.1] = -1
    return ids


def expected_of(ids: Tensor, experts: int, **options: Any) -> Permutation:
    with grpo_kernels.backend("reference"):
        return grpo_kernels.build_permutation(ids, experts, **options)


def check(ids: Tensor, experts: int, order: int, **options: Any) -> None:
    expected = expected_of(ids, experts, **options)
    with emulated(order):
        actual = grpo_kernels.build_permutation(ids, experts, **options)
    for name, a, wanted in zip(actual._fields, actual, expected, strict=True):
        assert a.dtype == torch.int32, name
        assert torch.equal(a, wanted), name


@pytest.mark.parametrize("kind", ["random", "few", "one"])
@pytest.mark.parametrize("experts", [1, 2, 31, 257, 1024])
def test_every_option(experts: int, kind: str) -> None:
    """Alignments, ranges of experts and both widths of ids; rows that fill no warp, no tile, and more than one."""
    shapes = ((1, 1), (7, 3), (33, 4), (150, 8), (515, 5))
    for order, (tokens, top_k) in zip(ORDERS, shapes, strict=True):
        ids = routes(tokens, top_k, experts, kind, order)
        check(ids, experts, order)
        check(ids.int(), experts, order, alignment=(1, 8, 3, 128, 16)[order])
        check(ids, experts, order, alignment=4, expert_range=(experts // 3, experts - experts // 4))


@pytest.mark.parametrize("slots", [TILE - 1, TILE, TILE + 1, 2 * TILE + 33, 3 * TILE])
def test_slots_around_a_tile(slots: int) -> None:
    for order in ORDERS:
        check(routes(slots, 1, 40, seed=order), 40, order, alignment=5)


@pytest.mark.parametrize("tokens", [0, 1, 40])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_nothing_has_a_row(tokens: int, dtype: torch.dtype) -> None:
    """No tokens, no expert that wants them, and a rank without experts."""
    for order in (0, 2):
        check(torch.full((tokens, 3), -1, dtype=dtype), 9, order, alignment=16)
        check(torch.zeros(tokens, 3, dtype=dtype), 9, order, expert_range=(4, 9), alignment=2)
        check(torch.zeros(tokens, 3, dtype=dtype), 9, order, expert_range=(4, 4), alignment=8)


def test_ids_that_are_no_experts_have_no_row() -> None:
    """The CPU raises; a GPU cannot look."""
    ids = routes(300, 4, 40)
    wrong = ids.clone()
    wrong[::7, 1], wrong[3::11, 0], wrong[5::13, 3] = 40, 2**40, -(2**40)
    clean = torch.where((wrong >= 0) & (wrong < 40), wrong, -1)
    with emulated(2):
        actual = grpo_kernels.build_permutation(wrong, 40, alignment=8)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected_of(clean, 40, alignment=8), strict=True))


@pytest.mark.parametrize(("slots", "experts"), [(200, 7), (2 * TILE + 100, 300)])
def test_every_order_gives_the_same_bits(slots: int, experts: int) -> None:
    ids = routes(slots // 4, 4, experts)
    assert_same_in_every_order(lambda: list(grpo_kernels.build_permutation(ids, experts, alignment=16)), range(12))
