"""The Triton kernel of the targets of multi-token prediction, and how it cuts the rows."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class LaunchConfig(NamedTuple):
    """How the kernel cuts the rows. Depends on nothing."""

    rows: int  # of a program: one a thread
    num_warps: int


def launch_config() -> LaunchConfig:
    """Four warps a program: 8192 rows fill 64 multiprocessors."""
    return LaunchConfig(128, 4)


@triton.jit
def _goes_on(positions, at, here, alive, step, end):
    """Whether the document of every row goes on until the row `at`, `step` rows behind it."""
    alive = alive & (at < end)
    if positions is not None:
        there = tl.load(positions + at, mask=alive, other=-1).to(tl.int64)
        alive = alive & (there >= 0) & (there - step == here)
    return alive


@triton.jit(do_not_specialize=["rows", "depths", "shift", "sequence_length", "ignore_index"])
def targets_kernel(
    token_ids,
    positions,
    mask,
    targets,
    counts,
    rows,
    depths,
    shift,
    sequence_length,
    ignore_index,
    ROWS: tl.constexpr,
):
    # Program b owns ROWS rows at every depth: it walks from each row forward, as long as the positions go on by one, and
    # writes what lies `shift` rows ahead and behind that. Memory gives every id, position and mask once, 4 to 17 bytes a
    # row, since what neighbours read is the same and in the caches, and takes 8 bytes a depth and row. Counts are added as
    # integers: in any order the same.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    alive = row < rows
    end = rows.to(tl.int64)
    if sequence_length is not None:
        end = tl.minimum((row // sequence_length + 1) * sequence_length, end)
    here = row
    if positions is not None:
        here = tl.load(positions + row, mask=alive, other=-1).to(tl.int64)
        alive = alive & (here >= 0)
        step = tl.minimum(shift, 1)
        while (step < shift) & (tl.max(alive.to(tl.int32), axis=0) > 0):
            alive = _goes_on(positions, row + step, here, alive, step, end)
            step += 1
    out = targets + row
    for depth in range(0, depths):
        ahead = shift + depth
        alive = _goes_on(positions, row + ahead, here, alive, ahead, end)
        token_id = tl.load(token_ids + row + ahead, mask=alive, other=-1).to(tl.int64)
        valid = alive & (token_id >= 0) & (token_id != ignore_index)
        if mask is not None:
            valid = valid & (tl.load(mask + row + ahead, mask=alive, other=0) != 0)
        tl.store(out, tl.where(valid, token_id, -1), mask=row < rows)
        out += rows
        tl.atomic_add(counts + depth, tl.sum(valid.to(tl.int64), axis=0), sem="relaxed")
