"""How Triton kernels of several ops read rows: a tile at a time, by the thread or side by side."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile(origin, SLOTS: tl.constexpr, WIDTH: tl.constexpr, NEIGHBOURS: tl.constexpr):
    """[SLOTS, WIDTH] columns, or addresses, of the tile that begins at `origin`."""
    slot = tl.arange(0, SLOTS)[:, None]
    element = tl.arange(0, WIDTH)[None, :]
    if NEIGHBOURS:
        found = (origin + slot * WIDTH) + element
    else:
        # The hidden zero keeps Triton from seeing that some rows are aligned after all; it would load 16 bytes a thread and
        # then exchange them. What is constant in a thread is added last: it goes into the instructions, not into registers.
        hidden = tl.where(tl.program_id(0) < 0, 1, 0)
        found = (origin + hidden + slot) + element * SLOTS
    return found


@triton.jit
def load_tile(row, start, end, padding, SLOTS: tl.constexpr, WIDTH: tl.constexpr, NEIGHBOURS: tl.constexpr):
    """Columns [start, end) of a row, `padding` behind them. Whole tiles need no mask, which would cost them wide loads."""
    pointers = tile(row + start, SLOTS, WIDTH, NEIGHBOURS)
    if start + SLOTS * WIDTH <= end:
        x = tl.load(pointers)
    else:
        x = tl.load(pointers, mask=tile(start, SLOTS, WIDTH, NEIGHBOURS) < end, other=padding)
    return x
