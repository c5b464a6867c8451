"""How the Triton kernels of grouped_gemm cut their work: pure functions of what the host knows."""

from __future__ import annotations

from typing import NamedTuple

import torch

from grpo_kernels.grouped_gemm._table_triton import GROUPED, WGRAD, Entry

L2_BYTES = 16 << 20
"""Of rows that a group of row blocks may have, to stay in the L2 cache while a weight streams past."""
PANEL = 64
"""Columns of a tile that are written at a time."""
LARGE_MEMORY = (90, 100, 101, 103, 110)
"""Architectures with 227 KiB of shared memory for a program; others have 163 or 99."""
LIBRARY_EXPERTS = 1024
"""PyTorch's kernel refuses as many groups, and more."""
FEW_ROWS = 96
"""Rows of an expert on average, up to which half a tile of rows is enough."""


class LaunchConfig(NamedTuple):
    """Tiles of the result, elements of the sum that are loaded at a time, and the options of a launch."""

    block_m: int
    block_n: int
    block_k: int
    pieces: int  # panels of a tile that are written one after another
    num_warps: int
    num_stages: int
    on_each: int  # programs that share a multiprocessor
    group: int  # row blocks that share their panels of a weight


def table_class(rows: int, experts: int, element_size: int) -> str:
    """The class of products that an entry of a table is for."""
    return f"{8 * element_size}-bit {'few' if rows <= FEW_ROWS * experts else 'many'}"


def _tuned(
    table: dict[tuple[int, str], Entry], rows: int, experts: int, element_size: int, architecture: int, loads: str
) -> Entry | None:
    """The entry of a table, or None. Entries are for the best loads that an architecture has."""
    if not table or loads != ("tma" if architecture >= 90 else "vector"):
        return None
    return table.get((architecture, table_class(rows, experts, element_size)))


def launch_config(
    rows: int, experts: int, width: int, element_size: int, architecture: int, loads: str
) -> LaunchConfig:  # fmt: skip
    """The forward's, and the gradient of x's: an entry of the tables, which were measured on a GPU; else by arithmetic
    (docs/tuning.md). A row's sum has the same order in all: block_k depends on none of the sizes.

    128 x 256 tiles keep the tensor cores of sm_90 fed from the L2 cache. Where experts have few rows, reading the weights
    takes the time, and smaller programs, two on a multiprocessor, have more loads in flight.

    Args:
        architecture: 10 * major + minor of the compute capability.
        loads: "tma"; "vector", 16 bytes a thread; "scalar", an element a thread.
    """
    few = rows <= FEW_ROWS * experts
    block_m, warps = (64, 4) if few else (128, 8)
    if element_size == 4:  # three products of tf32 each, whose halves are formed in registers
        block_n, block_k, stages = 64, 32 if loads == "tma" else 16, 3
    elif loads == "scalar":
        block_n, block_k, stages = 64, 32, 3
    elif loads == "tma" and architecture in LARGE_MEMORY:
        block_n, block_k, stages = 128 if few else 256, 64, 4
    else:
        block_n, block_k, stages = 128, 32, 4
    pieces, on_each, kept = block_n // PANEL, 2 if few else 1, L2_BYTES
    tuned = _tuned(GROUPED, rows, experts, element_size, architecture, loads)
    if tuned is not None:
        block_m, block_n, block_k, pieces, warps, stages, on_each, mib = tuned
        kept = mib << 20
    group = min(1024, max(1, kept // (block_m * width * element_size)))
    return LaunchConfig(block_m, block_n, block_k, pieces, warps, stages, on_each, group)


def wgrad_config(rows: int, experts: int, element_size: int, architecture: int, loads: str) -> LaunchConfig:
    """That of the weight's gradient: tiles of block_m of its columns N by block_n of its width K, block_k rows at a time."""
    tuned = _tuned(WGRAD, rows, experts, element_size, architecture, loads)
    if tuned is not None:
        return LaunchConfig(*tuned[:7], 1)
    block_n, block_k, warps, stages, on_each = 128, 32, 8, 4, 1
    if element_size == 4:
        block_n, block_k, stages = 64, 32 if loads == "tma" else 16, 3
    elif loads == "scalar":
        block_n, stages = 64, 3
    elif loads == "tma" and architecture in LARGE_MEMORY:
        few = rows <= FEW_ROWS * experts  # writing takes the time
        block_n, block_k, warps, stages, on_each = (128, 64, 4, 3, 2) if few else (256, 64, 8, 4, 1)
    return LaunchConfig(128, block_n, block_k, block_n // PANEL, warps, stages, on_each, 1)


def library_suits(
    architecture: int,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    rows: int,
    experts: int,
    aligned: bool,
) -> bool:
    """Whether `torch.nn.functional.grouped_mm` computes a product without a bias, right and fast.

    It has a kernel of its own for bfloat16 on sm_90. Elsewhere it loops over the experts and reads the offsets on the
    host; on sm_100 some of its products were wrong (pytorch issues 172439 and 186365). Where experts have few rows our
    smaller tiles fit better.

    Args:
        aligned: every row of every operand begins at a multiple of 16 bytes, and one axis of each is dense.
    """
    many = rows > FEW_ROWS * experts
    takes = dtype == out_dtype == torch.bfloat16 and experts < LIBRARY_EXPERTS
    return architecture == 90 and takes and many and aligned


def segments(experts: int) -> int:
    """Segments of rows that a program holds at once, those of no expert included: a power of two."""
    return max(16, 1 << experts.bit_length())
