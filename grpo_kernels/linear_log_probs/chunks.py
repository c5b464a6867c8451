"""A loss from hidden states in one pass over the head: gradients are formed where the logits are.

Rows go through in chunks. A chunk's logits are formed once; the row kernels reduce them to log-probs, the loss turns
these into derivatives, the row kernels turn the logits into their gradient, and two products take it to the hidden
states and to the weight: 6 N H V operations, with one chunk of logits in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels._gemm import accumulation_dtype, wide
from grpo_kernels._token_ids import live_rows
from grpo_kernels.linear_log_probs.head import Head
from grpo_kernels.linear_log_probs.row_values import Slopes, Targets, Values
from grpo_kernels.linear_log_probs.sums import Gradients, Needs, Sums, parts
from grpo_kernels.linear_log_probs.whole import fits, one_pass_within
from grpo_kernels.token_log_probs import ops as row_ops
from grpo_kernels.token_log_probs.statistics import MAXIMUM, TOTAL

_SMALLEST = 64  # rows; products of fewer wait for the weight to arrive from memory
_CPU_BYTES = (16 << 20, 128 << 20)  # least and most for the logits of a chunk
_CUDA_BYTES = 1 << 30


class _Chunk(NamedTuple):
    start: int
    end: int
    rows: slice | Tensor  # those between start and end that are computed


class _Work(NamedTuple):
    """The rows of a chunk in work."""

    rows: slice | Tensor
    hidden: Tensor
    projected: Tensor | None
    targets: Targets
    logits: Tensor

    def at(self, order: Tensor) -> _Work:
        """Some of the rows. Their logits move into the places of others, so that they stay dense."""
        for place, source in enumerate(order.tolist()):
            if place != source:
                self.logits[place] = self.logits[source]
        return _Work(
            order + self.rows.start if isinstance(self.rows, slice) else self.rows[order],
            self.hidden[order],
            None if self.projected is None else self.projected[order],
            self.targets.at(order),
            self.logits[: len(order)],
        )


def most_rows(vocab: int, device_type: str) -> int:
    """Rows of the largest chunk, however many rows there are."""
    limit = _CPU_BYTES[1] if device_type == "cpu" else _CUDA_BYTES
    return max(_SMALLEST, limit // (4 * vocab * _SMALLEST) * _SMALLEST)


def chunk_rows(rows: int, width: int, vocab: int, device_type: str) -> int:
    """Rows of a chunk: on a GPU as many as keep its products bound by arithmetic.

    On the CPU it is memory that counts. Eager PyTorch takes 3 N V - V H numbers above its inputs and gradients; a
    chunk's logits take a little less than an eighth of that.
    """
    most = most_rows(vocab, device_type)
    if device_type != "cpu":
        return most
    return min(most, max(_SMALLEST, _CPU_BYTES[0] // (4 * vocab), (3 * rows - width) * 15 // 128))


def one_pass(
    hidden: Tensor,
    head: Head,
    targets: Targets,
    slopes: Callable[[Values, int, int], Slopes],
    needs: Needs,
    gradients: Gradients,
    *,
    sequence_length: int = 0,
    top1_ids: bool = False,
    backend: str,
) -> Values:
    """Computes the values of all rows, and the gradients of a loss.

    With the native backend, on the CPU, where reading the data is free, masked rows are left out, and rows without a
    derivative from the products. Elsewhere nothing is read on the host: masked rows become zeros.

    Args:
        hidden: [N, H], of one dtype with the head.
        head: as the kernels take it.
        targets: of the N rows.
        slopes: gives the derivatives by the values of rows start to end, which are written by then.
        needs: the gradients that are wanted.
        gradients: where they are written.
        sequence_length: chunks hold whole sequences of this length; 0: the loss takes rows one by one.
        top1_ids: whether the likeliest token of each row is wanted.
        backend: of the row kernels.
    """
    compact = backend == "native"
    live = live_rows(targets.token_ids, targets.mask)
    targets = targets._replace(mask=None if compact else live)
    if compact and fits(int(live.sum()), head, needs, gradients):
        return one_pass_within(hidden, head, targets, live, slopes, needs, gradients, top1_ids)
    vocab, width = head.weight.shape
    chunks = list(_chunks(live, vocab, width, max(sequence_length, 1), compact))
    exact = accumulation_dtype(hidden.dtype)
    values = Values.of(hidden, top1_ids)
    sums = Sums(hidden, head, live, needs, gradients, len(chunks), compact)
    buffer = hidden.new_empty(max(map(_size, chunks), default=0), vocab, dtype=exact)
    for chunk in chunks:
        rows = chunk.rows
        x = wide(hidden[rows]) if compact else torch.where(live[rows, None], hidden[rows], 0)
        work = _Work(rows, x, head.project(x), targets.at(rows), buffer[: len(x)])
        statistics = _forward(work, head, values, backend)
        found = slopes(values, chunk.start, chunk.end)
        if isinstance(rows, Tensor):
            found = found.at(rows - chunk.start)
        order = _with_slope(found) if compact else None
        if order is not None:
            work, statistics, found = work.at(order), statistics[:, order], found.at(order)
        if len(work.hidden):
            sums.add(work.rows, work.hidden, work.projected, _backward(work, statistics, found, backend))
    sums.finish()
    return values


def _chunks(live: Tensor, vocab: int, width: int, unit: int, compact: bool) -> Iterator[_Chunk]:
    """All rows, or the live ones alone, in chunks that hold whole units."""
    count = len(live)
    living = int(live.sum()) if compact else count
    limit = chunk_rows(living, width, vocab, live.device.type)
    if living == 0:
        return
    if living < count:
        yield from _live_chunks(live, limit, unit)
        return
    units = count // unit
    pieces = -(-units // max(limit // unit, 1))
    for piece in range(pieces):
        start, end = units * piece // pieces * unit, units * (piece + 1) // pieces * unit
        yield _Chunk(start, end, slice(start, end))


def _live_chunks(live: Tensor, limit: int, unit: int) -> Iterator[_Chunk]:
    """The live rows alone: at most `limit` in a chunk, or one unit."""
    places = live.nonzero()[:, 0]
    if unit == 1:
        for rows in places.tensor_split(-(-len(places) // limit)):
            yield _Chunk(int(rows[0]), int(rows[-1]) + 1, rows)
        return
    start = done = filled = 0
    for place, count in enumerate([*live.view(-1, unit).sum(1).tolist(), limit + 1]):
        if filled and filled + count > limit:
            yield _Chunk(start, place * unit, places[done : done + filled])
            start, done, filled = place * unit, done + filled, 0
        filled += count


def _size(chunk: _Chunk) -> int:
    return len(chunk.rows) if isinstance(chunk.rows, Tensor) else chunk.end - chunk.start


def _forward(work: _Work, head: Head, values: Values, backend: str) -> Tensor:
    """Writes the logits and the values of the rows; returns the row statistics."""
    for start, end in parts(head):
        head.part(start, end).logits(work.logits[:, start:end], work.hidden, work.projected)
    log_probs, entropy, _, top1_ids, statistics = row_ops.token_log_probs(
        work.logits, *work.targets, True, False, values.top1_ids is not None, True, backend
    )
    log_sum_exp = statistics[MAXIMUM] + statistics[TOTAL].log()  # 0 + log 1 in a masked row
    values.write(work.rows, log_probs, entropy, log_sum_exp, top1_ids)
    row_statistics: Tensor = statistics
    return row_statistics


def _with_slope(slopes: Slopes) -> Tensor | None:
    """The rows that have a derivative, those beyond their number in the places of others; None: all."""
    keep = torch.stack([slope != 0 for slope in slopes if slope is not None]).any(0)
    count = int(keep.sum())
    if count == len(keep):
        return None
    order = torch.arange(count)
    order[~keep[:count]] = keep[count:].nonzero()[:, 0] + count
    return order


def _backward(work: _Work, statistics: Tensor, slopes: Slopes, backend: str) -> Tensor:
    """The gradient of the logits in the dtype of the products; in the place of the logits if that is theirs."""
    arguments = (work.logits, *work.targets, statistics, *slopes)
    if work.logits.dtype != work.hidden.dtype:
        grad: Tensor = row_ops.token_log_probs_backward(*arguments, work.hidden.dtype, backend)
        return grad
    row_ops.token_log_probs_backward_(*arguments, backend)
    return work.logits
