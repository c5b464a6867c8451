"""A vocabulary whose columns are spread over ranks: one exchange of row statistics replaces the others' logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed
from torch import Tensor

from grpo_kernels.token_log_probs.statistics import ABSENT, TARGET, merge


class VocabShard(NamedTuple):
    """The part of the vocabulary that this rank holds: ids start to end.

    Args:
        start: first id.
        end: one past the last id. Columns beyond end - start are padding.
        process_group: the ranks that hold the whole vocabulary together.
        reduce_hidden_grad: sum the gradient of the hidden states over the ranks; False where the caller's layer does.
    """

    start: int
    end: int
    process_group: torch.distributed.ProcessGroup | None = None
    reduce_hidden_grad: bool = True


def check(op: str, shard: VocabShard, columns: int) -> None:
    """`shard` describes a part of a vocabulary that fits into `columns`."""
    if not isinstance(shard, VocabShard):
        raise TypeError(f"{op}: vocab_shard must be a VocabShard, got {type(shard).__name__}")
    if not 0 <= shard.start <= shard.end or shard.end - shard.start > columns:
        raise ValueError(
            f"{op}: vocab_shard must have 0 <= start <= end <= start + {columns} columns, "
            f"got [{shard.start}, {shard.end})"
        )


def forward_ids(shard: VocabShard, token_ids: Tensor) -> Tensor:
    """The ids relative to the shard; 0 for those of other ranks, whose target statistic is then ignored."""
    return _relative(shard, token_ids, 0)


def backward_ids(shard: VocabShard, token_ids: Tensor) -> Tensor:
    """The ids relative to the shard; for those of other ranks one past its end: their rows have no target here."""
    return _relative(shard, token_ids, shard.end - shard.start)


def _relative(shard: VocabShard, token_ids: Tensor, absent: int) -> Tensor:
    inside = (token_ids >= shard.start) & (token_ids < shard.end)
    return torch.where(token_ids < 0, token_ids, torch.where(inside, token_ids - shard.start, absent))


def merged(
    shard: VocabShard,
    op: str,
    token_ids: Tensor,
    mask: Tensor | None,
    statistics: Tensor,
    sum_squared_probs: Tensor | None,
    top1_ids: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Statistics [4, ...] of the whole vocabulary, sums of e^2u and top-1 ids, from those of this rank's part."""
    outside = (token_ids < shard.start) | (token_ids >= shard.end)
    values = statistics.clone()
    values[TARGET].masked_fill_(outside & (token_ids >= 0), ABSENT)
    parts = [values]
    if sum_squared_probs is not None:
        total = statistics[1]
        parts.append(torch.where(total == 0, 0.0, sum_squared_probs * total * total)[None])
    packed = torch.cat(parts).contiguous()
    world = torch.distributed.get_world_size(shard.process_group)
    gathered = packed.new_empty((world, *packed.shape))
    torch.distributed.all_gather_into_tensor(gathered.view(-1), packed.view(-1), group=shard.process_group)
    ids = None
    if top1_ids is not None:
        mine = torch.where(top1_ids < 0, top1_ids, top1_ids + shard.start)
        ids = mine.new_empty((world, *mine.shape))
        torch.distributed.all_gather_into_tensor(ids.view(-1), mine.view(-1), group=shard.process_group)
    return merge(gathered[:, :4], gathered[:, 4] if sum_squared_probs is not None else None, ids)


def all_reduce_(shard: VocabShard, values: Tensor) -> Tensor:
    """The sum over the ranks, in place."""
    torch.distributed.all_reduce(values, group=shard.process_group)
    return values
