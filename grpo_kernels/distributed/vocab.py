"""A vocabulary whose columns are spread over ranks: one exchange of row statistics replaces the others' logits."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed
from torch import Tensor

from grpo_kernels import _checks
from grpo_kernels._checks import position
from grpo_kernels._collectives import all_gather, check_group
from grpo_kernels._sharded import is_dtensor
from grpo_kernels._token_ids import live_rows, part_ids
from grpo_kernels.token_log_probs.statistics import ABSENT, MAXIMUM, TARGET, TOTAL, finish, merge


class VocabShard(NamedTuple):
    """The part of the vocabulary that this rank holds: token ids start to end.

    The ranks of the group hold the whole vocabulary together, every id once, and make the same calls with the same
    rows. Parts may differ in size, and may be empty.

    Args:
        start: first id.
        end: one past the last id. Columns of logits, or rows of a weight, beyond end - start are padding.
        process_group: the ranks; None for all.
        reduce_hidden_grad: sum the gradient of the hidden states over the ranks. False where the caller's layer does.
    """

    start: int
    end: int
    process_group: torch.distributed.ProcessGroup | None
    reduce_hidden_grad: bool = True

    @classmethod
    def from_dtensor(
        cls, weight: Tensor, mesh_dim: int | str = 0, *, dim: int = 0, reduce_hidden_grad: bool = True
    ) -> VocabShard:
        """The part that this rank has of a DTensor; the op takes `weight.to_local()` beside it.

        Args:
            weight: DTensor, Shard(dim) on `mesh_dim` and Replicate on all others.
            mesh_dim: dimension of the device mesh over which the vocabulary is spread, its index or its name.
            dim: axis of the vocabulary: 0 of a head's weight, -1 of logits.
            reduce_hidden_grad: as above.

        Raises:
            TypeError, ValueError: it is no DTensor, or is placed otherwise.
        """
        op = "VocabShard.from_dtensor"
        if not is_dtensor(weight):
            raise TypeError(f"{op}: weight must be a DTensor, got {type(weight).__name__}")
        mesh: Any = weight.device_mesh  # type: ignore[attr-defined]
        index = _mesh_index(op, mesh, mesh_dim)
        if not -weight.ndim <= dim < weight.ndim:
            raise ValueError(f"{op}: dim must be an axis of weight {list(weight.shape)}, got {dim}")
        _check_placements(op, weight.placements, index, dim % weight.ndim)  # type: ignore[attr-defined]
        if mesh.get_coordinate() is None:
            raise ValueError(f"{op}: this rank is not in the device mesh of weight")
        # As torch cuts: parts of equal size, but for the last ones.
        columns = weight.shape[dim]
        size = -(-columns // mesh.size(index))
        start = min(mesh.get_local_rank(index) * size, columns)
        return cls(start, min(start + size, columns), mesh.get_group(index), reduce_hidden_grad)


def _mesh_index(op: str, mesh: Any, mesh_dim: int | str) -> int:
    names = mesh.mesh_dim_names or ()
    if isinstance(mesh_dim, str):
        _checks.check_choice(op, "mesh_dim", mesh_dim, (*names, *range(mesh.ndim)))
        index: int = names.index(mesh_dim)
        return index
    _checks.check_integer(op, "mesh_dim", mesh_dim, minimum=-mesh.ndim)
    if mesh_dim >= mesh.ndim:
        raise ValueError(f"{op}: mesh_dim must be < {mesh.ndim}, the dimensions of the device mesh, got {mesh_dim}")
    return mesh_dim % int(mesh.ndim)


def _check_placements(op: str, placements: Any, index: int, dim: int) -> None:
    from torch.distributed.tensor import Replicate, Shard

    shard = placements[index]
    others = [placement for place, placement in enumerate(placements) if place != index]
    if type(shard) is not Shard or shard.dim != dim or not all(type(other) is Replicate for other in others):
        raise ValueError(
            f"{op}: weight must be placed as Shard({dim}) on dimension {index} of its device mesh, Replicate() on all "
            f"others, got ({', '.join(map(str, placements))}). Gather it there first, as FSDP2 does in the forward of "
            "the module that owns it"
        )


def check(op: str, shard: VocabShard, columns: int) -> None:
    """`shard` describes a part of a vocabulary that fits into `columns`, of a group that this rank is in."""
    if not isinstance(shard, VocabShard):
        raise TypeError(
            f"{op}: vocab_shard must be a VocabShard(start, end, process_group), got {type(shard).__name__}"
        )
    _checks.check_integer(op, "vocab_shard.start", shard.start, minimum=0)
    _checks.check_integer(op, "vocab_shard.end", shard.end, minimum=shard.start)
    if shard.end - shard.start > columns:
        raise ValueError(
            f"{op}: vocab_shard must have at most {columns} ids, the columns that are there, got those from "
            f"{shard.start} to {shard.end}"
        )
    if not isinstance(shard.reduce_hidden_grad, bool):
        found = type(shard.reduce_hidden_grad).__name__
        raise TypeError(f"{op}: vocab_shard.reduce_hidden_grad must be a bool, got {found}")
    check_group(op, "vocab_shard.process_group", shard.process_group)


def forward_ids(shard: VocabShard, token_ids: Tensor) -> Tensor:
    """The ids relative to the shard; 0 for those of other ranks, whose target statistic is then ignored."""
    return part_ids(token_ids, shard.start, shard.end, 0)


def backward_ids(shard: VocabShard, token_ids: Tensor) -> Tensor:
    """The ids relative to the shard; for those of other ranks one past its end: their rows have no target here."""
    return part_ids(token_ids, shard.start, shard.end, shard.end - shard.start)


def of_no_columns(token_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the row kernels would return for a part without columns: no kernel runs on one."""
    zero = torch.zeros(token_ids.shape, dtype=dtype, device=token_ids.device)
    lowest = torch.full_like(zero, -math.inf)
    return zero, zero, zero, torch.full_like(token_ids, -1), torch.stack([lowest, zero, lowest, zero])


def combine(
    shard: VocabShard,
    op: str,
    token_ids: Tensor,
    mask: Tensor | None,
    part: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """log_probs, entropy, sum of squared probabilities, top-1 ids and statistics of whole rows from those of each part.

    One all-gather. The parts are merged in the order of the ranks, in float64, so that every rank has the same bits and
    log-probs are as exact as those of one process: targets travel relative to the maximum, where an offset that all
    logits share does not cost their digits.

    Args:
        token_ids: of the whole vocabulary.
        part: what the row kernels returned for this rank's part, statistics included; what is not wanted is empty.
        wanted: whether entropy, sum of squared probabilities and top-1 ids are wanted.

    Raises:
        ValueError: on the CPU, on every rank alike: no rank holds the id of a live row, or several do. Elsewhere that
            row is NaN.
    """
    entropy, want_squared, want_top1 = wanted
    live = live_rows(token_ids, mask)
    payload = _payload(shard, live, token_ids, part, wanted)
    gathered = all_gather(payload, shard.process_group)
    gathered = gathered.view(len(gathered) // len(payload), *payload.shape)
    dtype = part[4].dtype
    values = gathered[:, :4].view(dtype).double()
    maxima, totals = values[:, MAXIMUM], values[:, TOTAL]
    values[:, TARGET] = torch.where(values[:, TARGET] == ABSENT, ABSENT, values[:, TARGET] + maxima)
    squared = top1 = None
    if want_squared:
        squared = torch.where(totals == 0, 0.0, gathered[:, 4].view(dtype) * totals * totals)
    if want_top1:
        top1 = gathered[:, -1].long()
    whole, squared, top1 = merge(values, squared, top1)
    holders = (values[:, TARGET] != ABSENT).sum(0)
    wrong = live & (holders != 1)
    if token_ids.device.type == "cpu" and not torch.compiler.is_compiling():
        _raise_if_wrong(op, token_ids, holders, wrong)
    whole = torch.where(wrong, math.nan, whole)
    results = finish(whole, squared, top1, live, entropy)
    log_probs, entropies, squares, best = (whole.new_empty(0) if result is None else result for result in results)
    if dtype != torch.float64:  # torch 2.11 compiles gradients of zeros where a forward ends with a cast of nothing
        log_probs, entropies, squares, whole = (x.to(dtype) for x in (log_probs, entropies, squares, whole))
    return log_probs, entropies, squares, best.long(), whole


def _payload(
    shard: VocabShard,
    live: Tensor,
    token_ids: Tensor,
    part: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    wanted: tuple[bool, bool, bool],
) -> Tensor:
    """[4 to 6, ...] integers of the width of the statistics: so the ids keep all their digits."""
    log_probs, _, squared, top1, statistics = part
    word = torch.int64 if statistics.dtype == torch.float64 else torch.int32
    maximum, total, _, weighted = statistics.unbind(0)
    target = torch.where(total == 0, -math.inf, log_probs + total.log())  # relative to the part's maximum
    outside = (token_ids < shard.start) | (token_ids >= shard.end)
    target = torch.where(live & outside, ABSENT, target)
    rows = [row.view(word) for row in (maximum, total, target, weighted)]
    if wanted[1]:
        rows.append(squared.view(word))
    if wanted[2]:
        rows.append(torch.where(top1 < 0, top1, top1 + shard.start).to(word))
    return torch.stack(rows)


def _raise_if_wrong(op: str, token_ids: Tensor, holders: Tensor, wrong: Tensor) -> None:
    if not wrong.any():
        return
    row = int(wrong.reshape(-1).to(torch.uint8).argmax())
    raise ValueError(
        f"{op}: {position('token_ids', token_ids.shape, row)} must be the id of a token that one rank's vocab_shard "
        f"holds, or negative in a masked row, got {token_ids.reshape(-1)[row].item()}, which "
        f"{holders.reshape(-1)[row].item()} ranks hold"
    )


def all_reduce_(shard: VocabShard, values: Tensor) -> Tensor:
    """The sum over the ranks, in place."""
    torch.distributed.all_reduce(values, group=shard.process_group)
    return values
