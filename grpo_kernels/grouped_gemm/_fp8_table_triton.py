"""Configurations of the kernels for FP8 operands. Written by `python -m bench.tune --apply`; do not edit by hand."""

from __future__ import annotations

PRODUCT: dict[tuple[int, str], tuple[int, int, int, bool, int, int]] = {
    (89, "few"): (64, 8, 3, False, 1, 16),
    (89, "many"): (64, 8, 3, False, 1, 16),
    (90, "few"): (64, 4, 4, False, 2, 16),
    (90, "many"): (128, 4, 5, True, 1, 16),
    (100, "few"): (64, 4, 4, False, 2, 16),
    (100, "many"): (128, 8, 4, False, 1, 16),
}
"""By architecture and rows of an expert: rows of a tile, warps, stages, specialised warps, programs on a multiprocessor,
MiB of rows in a group."""
WGRAD: dict[tuple[int, str], tuple[int, int, bool]] = {
    (90, "aligned"): (4, 4, True),
    (90, "narrow"): (8, 4, False),
    (100, "aligned"): (8, 4, False),
    (100, "narrow"): (8, 4, False),
}
"""By architecture and rows of the accumulator: warps, stages, specialised warps."""
MEASURED: dict[tuple[str, int, str], str] = {}
"""By kernel and the key of its table: on what the entry was measured. Others were chosen without a GPU."""
