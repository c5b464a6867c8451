"""Biases of the experts follow the loads of all ranks and stay equal on all of them."""

from __future__ import annotations

import torch
import torch.distributed as dist

from grpo_kernels import update_expert_bias
from python_tests.distributed.launch import run

LOADS = torch.tensor([[[9, 1, 2], [0, 0, 0]], [[0, 5, 4], [7, 7, 7]]], dtype=torch.int32)  # [ranks, layers, E]


def _rank(rank: int, world: int) -> list[torch.Tensor]:
    bias = torch.zeros(2, 3)
    update_expert_bias(bias, LOADS[rank], 0.5, dist.group.WORLD)
    alone = torch.zeros(2, 3)
    update_expert_bias(alone, LOADS[rank], 0.5)
    return [bias, alone, LOADS[rank]]


def test_loads_are_summed_over_the_ranks() -> None:
    results = run(2, _rank)
    for rank, (bias, alone, loads) in enumerate(results):
        assert bias.tolist() == [[-0.5, 0.5, 0.5], [0.0, 0.0, 0.0]]  # loads 9, 6, 6 and 7, 7, 7
        assert torch.equal(loads, LOADS[rank])  # the argument stays as it is
        expected = torch.zeros(2, 3)
        update_expert_bias(expected, LOADS[rank], 0.5)
        assert torch.equal(alone, expected)
    assert results[1][1].tolist() == [[0.5, -0.5, -0.5], [0.0, 0.0, 0.0]]
