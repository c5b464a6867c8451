"""Schemas of the group statistics. Imports torch alone, so that they exist before anything is traced."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels import _dispatch

_PACKAGE = "grpo_kernels.group_advantages"

for _name in ("group_advantages", "informative_groups", "best_of_group"):
    _dispatch.register_backends(_name, cpu=("native",), cuda=("native",))


def _group_advantages_fake(rewards: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    shape = rewards.shape[:1]
    return (
        rewards.new_empty(shape, dtype=dtype),
        rewards.new_empty(shape, dtype=dtype),
        rewards.new_empty(shape, dtype=dtype),
    )


_group_advantages = _dispatch.define(
    "group_advantages(Tensor rewards, Tensor? group_ids, Tensor? reward_weights, Tensor? lengths, int group_size, "
    "str baseline, str normalize_by, str aggregation, str singleton, float eps, float batch_eps, int correction, "
    "str backend) -> (Tensor, Tensor, Tensor)",
    package=_PACKAGE,
    fake=_group_advantages_fake,
)
group_advantages = _dispatch.direct(_group_advantages)

informative_groups = _dispatch.define(
    "informative_groups(Tensor rewards, Tensor? group_ids, Tensor? mask, int group_size, float tolerance, str backend) "
    "-> Tensor",
    package=_PACKAGE,
    fake=lambda rewards, *_: rewards.new_empty(rewards.shape, dtype=torch.bool),
)

group_rank = _dispatch.define(
    "group_rank(Tensor scores, Tensor? group_ids, Tensor? valid, int group_size, str backend) -> Tensor",
    package=_PACKAGE,
    fake=lambda scores, *_: scores.new_empty(scores.shape, dtype=torch.int32),
)
