"""What Triton kernels that multiply matrices share: the products, and the order and the panels of their tiles."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def position(item, row_blocks, columns, group):
    """(row block, column) of a work item. A group of row blocks, which stays in the L2 cache, goes through all columns
    before the next group does; within it neighbours share their panel of the weight."""
    first = item // (group * columns) * group
    size = tl.minimum(row_blocks - first, group)
    rest = item - first * columns
    return first + rest % size, rest // size


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b. PRECISION "interpreted": the interpreter would multiply the bits of bfloat16 numbers."""
    if PRECISION == "interpreted":
        found = tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        found = tl.dot(a, b, acc, input_precision=PRECISION)
    return found


@triton.jit
def nothing(start):
    """0, which the compiler cannot know. Addresses that are formed with it are formed in each tile: they would else be
    carried in registers through the sum of every tile. It sees a multiple of 16, so that columns which begin there still
    lie together."""
    return tl.where(start < 0, 16, 0)


@triton.jit
def halves(tile):
    """The left and the right half of a tile. Both stay where they are, in the registers of their threads."""
    return tile.reshape(tile.shape[0], 2, tile.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def pieces(tile, PIECES: tl.constexpr):
    """A tile cut into 1, 2, 4 or 8 panels, left to right: what is done with one needs fewer registers at a time."""
    if PIECES == 1:
        panels = (tile,)
    else:
        left, right = halves(tile)
        panels = pieces(left, PIECES // 2) + pieces(right, PIECES // 2)
    return panels
