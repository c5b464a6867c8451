"""How the product of FP8 operands cuts its work: a pure function of what the host knows."""

from __future__ import annotations

from typing import NamedTuple

from grpo_kernels.grouped_gemm._config_triton import L2_BYTES, LARGE_MEMORY

TILE = 128
"""Elements of a sum, and columns of a weight, that share a scale: a tile's depth and its columns."""
FEW_ROWS = 256
"""Rows of an expert on average, up to which tiles have 64 rows: a tile of 128 would be a fifth empty, and more."""
HARDWARE = 89
"""The first architecture with products of FP8; before it, operands are widened to bfloat16."""
TABLE_BLOCK = 128
"""Entries of the table that are written at a time."""


class LaunchConfig(NamedTuple):
    """Rows of a tile and the options of a launch."""

    block_m: int
    num_warps: int
    num_stages: int
    specialized: bool  # one group of warps loads, the others multiply
    on_each: int  # programs that share a multiprocessor
    group: int  # row blocks that share their panels of a weight


def launch_config(rows: int, experts: int, width: int, architecture: int) -> LaunchConfig:
    """A row's sum has the same order in all.

    With groups of warps of their own for loading and for multiplying, one group scales its sums while the tensor core
    works for the other. Triton does that where it is asked for four warps, and on sm_90 alone in every release that we
    support. Where experts have few rows, reading the weights takes the time: two programs share a multiprocessor.

    Args:
        architecture: 10 * major + minor of the compute capability, 89 or more.
    """
    few = rows <= FEW_ROWS * experts
    asynchronous = architecture in LARGE_MEMORY  # products that read shared memory, several blocks of it ahead
    block_m = 128 if asynchronous and not few else 64
    group = min(1024, max(1, L2_BYTES // (block_m * width)))
    if not asynchronous:
        return LaunchConfig(block_m, 8, 3, False, 1, group)
    if few:
        return LaunchConfig(block_m, 4, 4, False, 2, group)
    if architecture == 90:
        return LaunchConfig(block_m, 4, 5, True, 1, group)
    return LaunchConfig(block_m, 8, 4, False, 1, group)


def wgrad_config(architecture: int, narrow: bool) -> LaunchConfig:
    """That of the weight's gradient, whose tiles have 128 rows and columns; for architectures with the TMA unit and much
    shared memory.

    Args:
        narrow: it is added to an accumulator whose rows are not aligned: more addresses than specialised warps, which
            have 168 registers, can hold.
    """
    specialized = architecture == 90 and not narrow
    return LaunchConfig(TILE, 4 if specialized else 8, 4, specialized, 1, 1)


def row_tiles(rows: int, experts: int, block_m: int) -> int:
    """Most tiles of rows that segments can have, whatever the offsets: the rows of no expert are a segment, too."""
    return -(-rows // block_m) + min(experts + 1, rows)
