"""group_advantages, informative_groups and best_of_group: the CUDA kernels, emulated, against the definition."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import grpo_kernels
from grpo_kernels.testing import assert_as_accurate
from python_tests.emulator import ORDERS, emulated
from python_tests.emulator.checks import assert_same_in_every_order
from python_tests.test_group_advantages import OPTIONS, sample_lengths

NAN = float("nan")


def rewards_of(batch: int, functions: int = 1, seed: int = 0) -> Tensor:
    """With samples that some functions, or none, have scored, and runs of equal rewards."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(batch, functions, generator=generator)
    rewards[torch.rand(batch, functions, generator=generator) < 0.1] = NAN
    rewards[torch.rand(batch, generator=generator) < 0.05] = NAN
    rewards[batch // 2 : batch // 2 + 7] = 0.25
    return rewards


def ragged_ids(batch: int, groups: int, seed: int = 0) -> Tensor:
    return torch.randint(-groups // 2, groups, (batch,), generator=torch.Generator().manual_seed(seed))


def check(rewards: Tensor, order: int, **options: Any) -> None:
    options["lengths"] = sample_lengths(len(rewards), order)
    with emulated(order):
        actual = grpo_kernels.group_advantages(rewards, **options)
    with grpo_kernels.backend("reference"):
        expected = grpo_kernels.group_advantages(rewards.double(), **options)
    for name, a, wanted in zip(actual._fields, actual, expected, strict=True):
        assert_as_accurate(a, wanted, wanted.float(), name=name)


@pytest.mark.parametrize("group", ["equal", "ragged"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_every_option(options: dict[str, Any], group: str) -> None:
    weights = torch.tensor([1.0, 0.5, -2.0])
    for order, (batch, size) in zip((0, 1, 2), ((36, 9), (160, 40), (66, 33)), strict=True):
        groups = {"group_size": size} if group == "equal" else {"group_ids": ragged_ids(batch, 6, order)}
        check(rewards_of(batch, 3, order), order, reward_weights=weights, **groups, **options)


@pytest.mark.parametrize(
    "options",
    [{}, {"normalize_by": "batch"}, {"baseline": "second_best"}, {"baseline": "length_weighted"}],
    ids=lambda o: "-".join(o.values()),
)
@pytest.mark.parametrize("size", [1, 2, 31, 32, 33, 100, 1025])
def test_group_sizes(size: int, options: dict[str, Any]) -> None:
    """Around a warp, which owns a group; and 5 groups, which do not fill a block."""
    for order, groups in zip(ORDERS, (1, 5, 3, 2, 4), strict=True):
        rewards = rewards_of(groups * size, 1, order)[:, 0]
        check(rewards, order, group_size=size, **options)
        check(rewards, order, group_ids=torch.arange(groups).repeat_interleave(size), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_at_a_large_batch(dtype: torch.dtype) -> None:
    rewards = rewards_of(3000, 2).to(dtype)
    for order, options in zip(
        (2, 3, 4), ({}, {"normalize_by": "batch"}, {"aggregation": "normalize_then_sum"}), strict=True
    ):
        check(rewards, order, group_size=8, **options)
        check(rewards, order, group_ids=ragged_ids(3000, 500), **options)


@pytest.mark.parametrize("batch", [1, 40])
def test_nothing_is_scored(batch: int) -> None:
    tokens = {"baseline": "length_weighted", "normalize_by": "batch_tokens", "lengths": torch.ones(batch)}
    for order, options in itertools.product(
        (0, 2),
        ({}, {"normalize_by": "batch"}, {"aggregation": "normalize_then_sum"}, {"baseline": "second_best"}, tokens),
    ):
        with emulated(order):
            out = grpo_kernels.group_advantages(torch.full((batch,), NAN), group_size=batch, **options)
        assert not torch.stack(out).any()


def test_an_empty_batch() -> None:
    with emulated():
        assert grpo_kernels.group_advantages(torch.zeros(0), group_size=4).advantages.shape == (0,)
        assert grpo_kernels.informative_groups(torch.zeros(0), group_size=4).shape == (0,)
        assert grpo_kernels.best_of_group(torch.zeros(0), 1, group_size=4).rank.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("batch", "size"), [(5, 1), (62, 31), (64, 32), (66, 33), (300, 100), (2000, 8)])
def test_informative_groups_and_ranks(batch: int, size: int, dtype: torch.dtype) -> None:
    flags = torch.rand(batch) < 0.8
    rewards = (rewards_of(batch, 1, size)[:, 0] * 2).round().to(dtype)  # with ties
    rewards[: 2 * size] = 1.0
    for order, groups in itertools.product(
        (0, 1, 3), ({"group_size": size}, {"group_ids": ragged_ids(batch, batch // size)})
    ):
        with emulated(order):
            actual = [
                grpo_kernels.informative_groups(rewards, mask=flags, **groups),
                grpo_kernels.informative_groups(rewards, tolerance=1.5, **groups),
                *grpo_kernels.best_of_group(rewards, 3, valid=flags, **groups),
                *grpo_kernels.best_of_group(rewards, 1, **groups),
            ]
        with grpo_kernels.backend("reference"):
            expected = [
                grpo_kernels.informative_groups(rewards.double(), mask=flags, **groups),
                grpo_kernels.informative_groups(rewards.double(), tolerance=1.5, **groups),
                *grpo_kernels.best_of_group(rewards.double(), 3, valid=flags, **groups),
                *grpo_kernels.best_of_group(rewards.double(), 1, **groups),
            ]
        for a, wanted in zip(actual, expected, strict=True):
            assert torch.equal(a, wanted)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalize_by": "batch"},
        {"aggregation": "normalize_then_sum"},
        {"baseline": "length_weighted", "normalize_by": "batch_tokens", "lengths": sample_lengths(700)},
        {
            "baseline": "second_best",
            "aggregation": "normalize_then_sum",
            "normalize_by": "batch_tokens",
            "lengths": sample_lengths(700),
        },
    ],
    ids=["group", "batch", "gdpo", "tokens", "second_best"],
)
def test_every_order_gives_the_same_bits(options: dict[str, Any]) -> None:
    rewards, ids = rewards_of(700, 3), ragged_ids(700, 60)
    assert_same_in_every_order(lambda: list(grpo_kernels.group_advantages(rewards, group_ids=ids, **options)))
