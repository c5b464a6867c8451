"""The configurations of the products of 16 and 32 bits that are tried: of grouped_gemm, and of linear_log_probs.

An entry of their tables and a candidate are the same eight numbers. Every one of these compiles for sm_90 or sm_80
without spills with all that a launch may ask for (`python -m bench.tune --compile 90`); what did not is in no list.
"""

from __future__ import annotations

from typing import NamedTuple

from grpo_kernels.grouped_gemm import _config_triton as grouped_config
from grpo_kernels.grouped_gemm import _table_triton as grouped_table
from grpo_kernels.linear_log_probs import _config_triton as linear_config
from grpo_kernels.linear_log_probs import _table_triton as linear_table

TABLES = {
    "forward": linear_table.FORWARD,
    "dlogits": linear_table.DLOGITS,
    "grouped": grouped_table.GROUPED,
    "grouped_wgrad": grouped_table.WGRAD,
}
OPS = tuple(TABLES)
_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 120: 99, 121: 99}
"""Of shared memory that a program may have, where it is not 227."""
_MIB = (8, 32)


class Tiles(NamedTuple):
    """An entry of a table."""

    block_m: int
    block_n: int
    block_k: int
    pieces: int
    num_warps: int
    num_stages: int
    on_each: int = 1
    mib: int = 16


def element_size(size: str) -> int:
    return int(size.partition("-")[0]) // 8


def loads(architecture: int) -> str:
    """Those that the tables are for."""
    return "tma" if architecture >= 90 else "vector"


def shared_bytes(tiles: Tiles, size: str) -> int:
    """Of the operands of all stages: at least what the kernel takes."""
    return (tiles.block_m + tiles.block_n) * tiles.block_k * element_size(size) * tiles.num_stages


def fits(tiles: Tiles, architecture: int, size: str) -> bool:
    """Whether the operands of as many programs as there are to be have a place in shared memory."""
    of_program = _KIB.get(architecture, 227) << 10
    needed = shared_bytes(tiles, size) + 1024
    return needed <= of_program and tiles.on_each * needed <= of_program + 1024


def default(op: str, architecture: int, size: str) -> Tiles:
    """What is shipped: the entry of the table, or else the heuristics."""
    entry = TABLES[op].get((architecture, size))
    if entry is not None:
        return Tiles(*entry)
    width, way = element_size(size), loads(architecture)
    if op in ("forward", "dlogits"):
        rank, capped = (64 if "lora" in size else 0), "capped" in size
        of_head = linear_config.launch_config(2**17, 4096, width, architecture, way, rank, capped, op)
        return Tiles(*of_head[:3], *of_head[4:8], mib=linear_config.L2_BYTES >> 20)
    rows = 1 if "few" in size else 1024
    if op == "grouped":
        config = grouped_config.launch_config(rows, 1, 4096, width, architecture, way)
        return Tiles(*config[:7], mib=grouped_config.L2_BYTES >> 20)
    return Tiles(*grouped_config.wgrad_config(rows, 1, width, architecture, way)[:7], mib=0)


_HEAD = [(128, 256, 4, 8, 4), (128, 256, 8, 8, 3), (256, 128, 4, 8, 4), (256, 128, 8, 8, 3), (128, 128, 4, 8, 4)]
_PAIR = [(128, 128, 4, 4, 3, 2), (128, 128, 8, 4, 3, 2), (64, 128, 4, 4, 4, 2)]
_SMALL_HEAD = [(128, 128, 4, 8, 3), (128, 128, 8, 8, 5), _PAIR[-1]]
_EXPERTS = [(128, 256, 4, 8, 3), (256, 128, 2, 8, 4), (128, 128, 2, 4, 3, 2), (128, 128, 2, 8, 4)]
_FEW = [(64, 128, 2, 4, 3, 2), (64, 256, 4, 8, 4), (64, 64, 1, 4, 6, 2), (64, 128, 2, 4, 3, 3), (128, 128, 2, 4, 3, 2)]
_FLOAT = [(128, 64, 2, 8, 4), (64, 64, 2, 4, 3, 2), (128, 128, 4, 8, 3), (64, 128, 4, 8, 3)]
_LARGE: dict[tuple[str, str], list[tuple[int, ...]]] = {
    ("forward", "16-bit plain"): [*_HEAD, *_PAIR],
    ("forward", "16-bit capped"): _SMALL_HEAD,
    ("forward", "16-bit lora"): [*_SMALL_HEAD, *_PAIR],
    ("forward", "32-bit plain"): _FLOAT,
    ("dlogits", "16-bit plain"): [*_HEAD, *_PAIR],
    ("dlogits", "16-bit capped"): [*_SMALL_HEAD, *_PAIR],
    ("dlogits", "16-bit lora"): [*_SMALL_HEAD, *_PAIR],
    ("dlogits", "32-bit plain"): _FLOAT,
    ("grouped", "16-bit many"): _EXPERTS,
    ("grouped", "16-bit few"): _FEW,
    ("grouped", "32-bit many"): _FLOAT,
    ("grouped_wgrad", "16-bit many"): _EXPERTS,
    ("grouped_wgrad", "16-bit few"): [(128, 128, 2, 8, 4), (64, 128, 2, 4, 4, 2), (128, 256, 4, 8, 4)],
    ("grouped_wgrad", "32-bit many"): _FLOAT,
}
"""block_m, block_n, panels, warps, stages, and programs on a multiprocessor; architectures with 227 KiB and the TMA."""
_OTHER_HEAD = [(128, 128, 2, 8, 3), (128, 64, 2, 4, 4, 2), (128, 64, 2, 8, 4), (64, 128, 2, 8, 4)]
_OTHER_EXPERTS = [(128, 128, 2, 8, 3), (128, 128, 2, 8, 5), (64, 128, 2, 4, 4, 2), (128, 64, 1, 4, 4, 2)]
_OTHER = {
    (op, size): _FLOAT if "32-bit" in size else _OTHER_HEAD if op in ("forward", "dlogits") else _OTHER_EXPERTS
    for op, size in _LARGE
}
_OTHER["forward", "32-bit plain"] = [_FLOAT[0], _FLOAT[-1]]


def candidates(op: str, architecture: int, size: str) -> list[Tiles]:
    """The default first. block_k is the default's in all, and with it the order of every sum over the width. Other
    groups of rows are tried with the default's tiles alone."""
    first = default(op, architecture, size)
    forms = (_LARGE if architecture in grouped_config.LARGE_MEMORY else _OTHER)[op, size]
    tiles = [
        Tiles(block_m, block_n, first.block_k, pieces, *rest)._replace(mib=first.mib)
        for block_m, block_n, pieces, *rest in forms
    ]
    tiles = [choice for choice in tiles if fits(choice, architecture, size)]
    groups = [first._replace(mib=mib) for mib in _MIB] if first.mib else []
    return list(dict.fromkeys([first, *tiles, *groups]))
