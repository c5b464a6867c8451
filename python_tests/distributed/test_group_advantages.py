"""Groups that straddle ranks give every rank the bits that one process with all samples gets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

import grpo_kernels
from python_tests.distributed.launch import run

VARIANTS: list[dict[str, Any]] = [
    {"group_size": 6},
    {"group_size": 3, "normalize_by": "batch"},
    {"ids": True, "baseline": "leave_one_out"},
    {"ids": True, "aggregation": "normalize_then_sum"},
    {"ids": True, "baseline": "length_weighted", "normalize_by": "batch_tokens"},
    {"group_size": 6, "baseline": "second_best"},
]


def _batch(samples: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    rewards = torch.randn(samples, 2, generator=generator)
    rewards[4] = float("nan")
    ids = torch.randint(0, 4, (samples,), generator=generator)
    return rewards, ids, torch.randint(0, 50, (samples,), generator=generator)


def _advantages(
    rewards: torch.Tensor, ids: torch.Tensor, lengths: torch.Tensor, variant: dict[str, Any], group: Any
) -> list[torch.Tensor]:
    options = {key: value for key, value in variant.items() if key != "ids"}
    if variant.get("ids"):
        options["group_ids"] = ids
    return list(grpo_kernels.group_advantages(rewards, lengths=lengths, process_group=group, **options))


def _rank(rank: int, world: int, samples: int) -> list[list[torch.Tensor]]:
    part = slice(rank * samples // world, (rank + 1) * samples // world)
    own = [tensor[part] for tensor in _batch(samples)]
    return [_advantages(*own, variant, dist.group.WORLD) for variant in VARIANTS]


@pytest.mark.parametrize(("world", "samples"), [(2, 12), (4, 12), (2, 0)])
def test_ranks_together_equal_one_process(world: int, samples: int) -> None:
    if samples == 0:
        results = run(world, _rank_of_nothing)
        assert results == [[0, 0, 0]] * world
        return
    results = run(world, _rank, samples)
    for index, variant in enumerate(VARIANTS):
        whole = _advantages(*_batch(samples), variant, None)
        for position, expected in enumerate(whole):
            parts = torch.cat([results[rank][index][position] for rank in range(world)])
            torch.testing.assert_close(parts, expected, rtol=0, atol=0)


def _rank_of_nothing(rank: int, world: int) -> list[int]:
    nothing = torch.empty(0, dtype=torch.int64)
    return [len(t) for t in _advantages(torch.empty(0), nothing, nothing, VARIANTS[4], dist.group.WORLD)]
