"""How the product of FP8 operands cuts its work: a pure function of what the host knows."""

from __future__ import annotations

from typing import NamedTuple

from grpo_kernels.grouped_gemm._config_triton import LARGE_MEMORY
from grpo_kernels.grouped_gemm._fp8_table_triton import PRODUCT, WGRAD

TILE = 128
"""Elements of a sum, and columns of a weight, that share a scale: a tile's depth and its columns."""
FEW_ROWS = 256
"""Rows of an expert on average, up to which they are few: a tile of 128 would be a fifth empty, and more."""
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


def family(architecture: int) -> int:
    """The architecture whose entries of the tables hold for this one, too. Its kernels are of the same kind: products
    that wait for each load, those of sm_90, or other products that read shared memory, several blocks of it ahead."""
    if architecture == 90:
        return 90
    return 100 if architecture in LARGE_MEMORY else HARDWARE


def row_blocks(mib: int, block_m: int, width: int) -> int:
    """As many as `mib` MiB of rows have: they are to stay in the L2 cache while a weight streams past."""
    return min(1024, max(1, (mib << 20) // (block_m * width)))


def launch_config(rows: int, experts: int, width: int, architecture: int) -> LaunchConfig:
    """A row's sum has the same order in all: the depth of a tile is in none of them.

    With groups of warps of their own for loading and for multiplying, one group scales its sums while the tensor core
    works for the other. Triton does that where it is asked for four warps, and on sm_90 alone in every release that we
    support. Where experts have few rows, reading the weights takes the time: two programs share a multiprocessor.

    Args:
        architecture: 10 * major + minor of the compute capability, 89 or more.
    """
    size = "few" if rows <= FEW_ROWS * experts else "many"
    block_m, warps, stages, specialized, on_each, mib = PRODUCT[family(architecture), size]
    return LaunchConfig(block_m, warps, stages, specialized, on_each, row_blocks(mib, block_m, width))


def wgrad_config(architecture: int, narrow: bool) -> LaunchConfig:
    """That of the weight's gradient, whose tiles have 128 rows and columns; for architectures with the TMA unit and much
    shared memory.

    Args:
        narrow: it is added to an accumulator whose rows are not aligned: more addresses than specialised warps, which
            have 168 registers, can hold.
    """
    return LaunchConfig(TILE, *WGRAD[family(architecture), "narrow" if narrow else "aligned"], 1, 1)


def row_tiles(rows: int, experts: int, block_m: int) -> int:
    """Most tiles of rows that segments can have, whatever the offsets: the rows of no expert are a segment, too."""
    return -(-rows // block_m) + min(experts + 1, rows)
