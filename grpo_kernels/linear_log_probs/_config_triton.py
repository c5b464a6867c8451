"""How the Triton kernels of linear_log_probs cut their work: pure functions, the same for every batch."""

from __future__ import annotations

from typing import NamedTuple

from grpo_kernels.linear_log_probs._table_triton import DLOGITS, FORWARD, Entry

MAX_SPLITS = 128
"""Most parts of a vocabulary that are reduced on their own: as many programs are busy even with one block of rows."""
WORKSPACE_BYTES = 256 << 20
"""Most bytes of gradients of logits that exist at a time, unless there are too many rows for slices of 256 columns."""
L2_BYTES = 16 << 20
"""Of hidden states that a group of row blocks may have, to stay in the L2 cache while the weight streams past."""
COLUMNS = 256
"""The workspace is a multiple of this wide: whole tiles of every configuration."""
_TENSOR_MEMORY = (100, 101, 103, 110)


class LaunchConfig(NamedTuple):
    """Tiles, and the options of a launch. Depends on V, H, dtype, architecture and how operands lie, never on N."""

    block_m: int
    block_n: int
    block_k: int
    block_r: int  # of the LoRA rank
    pieces: int  # panels of a tile that are reduced one after another
    num_warps: int
    num_stages: int
    on_each: int  # programs that share a multiprocessor
    max_registers: int | None  # of a thread; None: the compiler may give up some for a second program
    splits: int
    tiles_per_split: int
    group: int  # row blocks that share their panels of the weight


def table_class(element_size: int, rank: int, capped: bool) -> str:
    """The class of heads that an entry of a table is for; "" where there is none: both a softcap and LoRA."""
    if rank and capped:
        return ""
    return f"{8 * element_size}-bit {'lora' if rank else 'capped' if capped else 'plain'}"


def _tuned(kernel: str, element_size: int, architecture: int, loads: str, rank: int, capped: bool) -> Entry | None:
    """The entry of a table, or None. Entries are for the best loads that an architecture has."""
    table = FORWARD if kernel == "forward" else DLOGITS
    if not table or loads != ("tma" if architecture >= 90 else "vector"):
        return None
    return table.get((architecture, table_class(element_size, rank, capped)))


def launch_config(
    vocab: int,
    width: int,
    element_size: int,
    architecture: int,
    loads: str,
    rank: int = 0,
    capped: bool = False,
    kernel: str = "forward",
) -> LaunchConfig:
    """An entry of the tables, which were measured on a GPU; else the configuration that compiles without spills and keeps
    the tensor cores fed as far as the arithmetic says (docs/tuning.md).

    128 x 256 tiles read 48 KiB for 1024 cycles of bfloat16 tensor cores on sm_90; square ones would ask a third more
    of the L2 cache. A thread then holds 128 accumulators, so that logits are reduced in panels of 32 columns.

    Args:
        architecture: 10 * major + minor of the compute capability.
        loads: "tma"; "vector", 16 bytes a thread; "scalar", an element a thread.
        rank: of the LoRA factors, 0 without.
        capped: with a softcap.
        kernel: "forward" or "dlogits". block_k is the same for both: the backward forms the very logits of the forward.
    """
    block_m, warps, on_each, kept = 128, 8, 1, L2_BYTES
    if element_size == 4:  # three products of tf32 each, whose halves are formed in registers
        block_n, block_k, pieces, stages = 64, 32 if loads == "tma" else 16, 2, 3
    elif loads == "scalar":
        block_n, block_k, pieces, stages = 64, 32, 2, 3
    elif rank and architecture in _TENSOR_MEMORY and loads == "tma":  # the sum moves out of it for the second product
        block_n, block_k, pieces, stages = 64, 64, 4, 4
    elif architecture in (90, *_TENSOR_MEMORY) and loads == "tma":
        heavy = rank or (capped and architecture == 90)  # the tanh needs registers of its own
        block_n, block_k, pieces, stages = 128 if heavy else 256, 64, 8, 4
    else:  # 100 or 164 KiB of shared memory
        block_n, block_k, pieces, stages = 64 if capped else 128, 32, 2, 4
    tuned = _tuned(kernel, element_size, architecture, loads, rank, capped)
    if tuned is not None:
        block_m, block_n, block_k, pieces, warps, stages, on_each, mib = tuned
        kept = mib << 20
    tiles = -(-vocab // block_n)
    tiles_per_split = -(-tiles // MAX_SPLITS)
    group = min(1024, max(1, kept // (block_m * width * element_size)))
    registers = 255 if rank and architecture in _TENSOR_MEMORY else None
    return LaunchConfig(
        block_m, block_n, block_k, 16, pieces, warps, stages, on_each, registers, -(-tiles // tiles_per_split),
        tiles_per_split, group,
    )  # fmt: skip


def slice_width(rows: int, vocab: int, element_size: int) -> int:
    """Columns of the vocabulary whose gradients are formed at a time: slices of about equal width, of whole tiles."""
    width = max(COLUMNS, WORKSPACE_BYTES // max(rows * element_size, 1) // COLUMNS * COLUMNS)
    count = -(-vocab // width)
    return -(-vocab // count // COLUMNS) * COLUMNS if count > 1 else -(-vocab // COLUMNS) * COLUMNS
