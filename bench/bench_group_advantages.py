"""group_advantages against what a trainer writes in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import grpo_kernels

from .case import Case, Inputs, Provider, compiled
from .target import ALLOCATION, device_time, host_cost, speedup

GROUP = 8
_EPS = 1e-4


def _ours(inputs: Inputs) -> Sequence[Tensor]:
    return grpo_kernels.group_advantages(inputs["rewards"], group_size=GROUP, eps=_EPS)


def _nan_aware(rewards: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards that were not scored (NaN) stay out of the statistics, as in ours."""
    grouped = rewards.view(-1, GROUP)
    count = (~grouped.isnan()).sum(dim=1)
    mean = torch.nanmean(grouped, dim=1)
    squares = torch.nansum((grouped - mean[:, None]) ** 2, dim=1)
    std = torch.sqrt(squares / (count - 1).clamp(min=1))
    mean, std = mean.repeat_interleave(GROUP), std.repeat_interleave(GROUP)
    return torch.nan_to_num((rewards - mean) / (std + _EPS), nan=0.0), mean, std


def _plain(rewards: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Without an idea of missing rewards."""
    grouped = rewards.view(-1, GROUP)
    mean = grouped.mean(dim=1).repeat_interleave(GROUP)
    std = grouped.std(dim=1).repeat_interleave(GROUP)
    return (rewards - mean) / (std + _EPS), mean, std


class _Allocation(torch.autograd.Function):
    """The least that an op with three outputs costs the host."""

    @staticmethod
    def forward(ctx: Any, rewards: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.empty_like(rewards), torch.empty_like(rewards), torch.empty_like(rewards)


def _provider(name: str, function: Any, kind: str) -> Provider:
    return Provider(name, lambda inputs: function(inputs["rewards"]), kind)


def _make(batch: int) -> Any:
    def make(device: str, size: str) -> Inputs:
        return {"rewards": torch.randn(batch if size == "full" else 16, device=device)}

    return make


def case(device: str, batch: int) -> Case:
    """One batch of groups."""
    target = speedup(3)
    if device == "cuda":
        target = device_time(10)
    return Case(
        op="group_advantages",
        name=f"B={batch} G={GROUP}",
        make=_make(batch),
        providers=(
            Provider("ours", _ours, "ours"),
            _provider("eager", _nan_aware, "eager"),
            _provider("eager without NaN", _plain, "peer"),
            _provider("torch.compile", compiled(_nan_aware), "compile"),
        ),
        bytes_moved=None,
        targets=(target,),
        quick=batch == 4096,
    )


def cases(device: str) -> list[Case]:
    """Two batches on the device's clock, and what a call costs the host."""
    found = [case(device, batch) for batch in (512, 4096)]
    found.append(
        Case(
            op="group_advantages",
            name=f"host cost of a call, B={2 * GROUP}",
            make=_make(2 * GROUP),
            providers=(
                Provider("ours", _ours, "ours"),
                _provider("eager", _nan_aware, "eager"),
                Provider(ALLOCATION, lambda inputs: _Allocation.apply(inputs["rewards"]), "part"),
            ),
            targets=(host_cost(device),),
            clock="host",
        )
    )
    return found
