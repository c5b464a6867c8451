"""Liger's losses on two ranks: the token count of the batch, and a vocabulary in parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from grpo_kernels.integrations.liger import (
    LigerFusedLinearGRPOLoss,
    LigerFusedLinearScaledCrossEntropyFunction,
    LigerFusedLinearScaledCrossEntropyTPFunction,
)
from python_tests.distributed.launch import run
from python_tests.liger_problems import problem

pytestmark = pytest.mark.usefixtures("native_cpu")

LENGTHS = ((6, 3, 0, 1), (1, 0, 2, 0))
ITEMS = {"none": None, "number": 40, "tensor": torch.tensor(40)}
LOSS_TYPES = ("dapo", "cispo", "vespo", "bnpo")


def _losses(rank: int, world: int) -> dict[str, Any]:
    p = problem(rank, LENGTHS[rank])
    results: dict[str, Any] = {}
    for loss_type in LOSS_TYPES:
        loss_fn = LigerFusedLinearGRPOLoss(beta=0.0, loss_type=loss_type)
        for name, items in ITEMS.items():
            hidden = p["hidden"].clone().requires_grad_()
            loss, _ = loss_fn(
                hidden, p["weight"], p["ids"], p["mask"], p["advantages"], old_per_token_logps=p["old"],
                num_items_in_batch=items,
            )  # fmt: skip
            results[f"{loss_type} {name}"] = loss.detach(), torch.autograd.grad(loss, hidden)[0]
    return results


def _alone(rank: int, loss_type: str) -> Any:
    """The sum over this rank's tokens, in one process."""
    p = problem(rank, LENGTHS[rank])
    hidden = p["hidden"].clone().requires_grad_()
    loss, _ = LigerFusedLinearGRPOLoss(beta=0.0, loss_type=loss_type)(
        hidden, p["weight"], p["ids"], p["mask"], p["advantages"], old_per_token_logps=p["old"]
    )
    total = loss * sum(LENGTHS[rank])
    return total.detach(), torch.autograd.grad(total, hidden)[0]


def test_global_means_divide_by_the_tokens_of_all_ranks() -> None:
    tokens = sum(map(sum, LENGTHS))
    for rank, results in enumerate(run(2, _losses)):
        for loss_type in LOSS_TYPES:
            sums = _alone(rank, loss_type)
            for name in ITEMS:
                count = tokens if name == "none" else 40
                divisor = sum(LENGTHS[rank]) if loss_type == "bnpo" else count / 2
                for value, total in zip(results[f"{loss_type} {name}"], sums, strict=True):
                    torch.testing.assert_close(value, total / divisor, rtol=1e-12, atol=1e-14)


def _scaled(rank: int, world: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 8, generator=generator).double().requires_grad_()
    weight = torch.randn(10, 8, generator=generator).double()
    target = torch.tensor([0, 9, -100, 4, 5, 5, 2])
    upstream = tuple(torch.randn(2, 7, generator=generator).double())
    part = weight[5 * rank : 5 * rank + 5].clone().requires_grad_()
    outputs = LigerFusedLinearScaledCrossEntropyTPFunction.apply(
        hidden, part, target, dist.group.WORLD, 0.7, -100, 1, True
    )
    whole = weight.requires_grad_()
    wanted = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, whole, target, 0.7, -100, 1, True)
    mine = torch.autograd.grad(outputs, (hidden, part), upstream)
    theirs = torch.autograd.grad(wanted, (hidden, whole), upstream)
    pairs = zip((*outputs, *mine), (*wanted, theirs[0], theirs[1][5 * rank : 5 * rank + 5]), strict=True)
    return [(a - b).abs().max().detach() for a, b in pairs]


def test_a_vocabulary_in_parts() -> None:
    for differences in run(2, _scaled):
        assert max(differences) < 1e-12
