"""Tuned configurations of grouped_gemm for 16 and 32 bits. Written by `python -m bench.tune --apply`; do not edit by hand."""

from __future__ import annotations

Entry = tuple[int, int, int, int, int, int, int, int]

GROUPED: dict[tuple[int, str], Entry] = {}
WGRAD: dict[tuple[int, str], Entry] = {}
"""By architecture and class: block_m, block_n, block_k, panels, warps, stages, programs on a multiprocessor, MiB of
rows in a group. What has no entry takes the heuristics of _config_triton.py."""
MEASURED: dict[tuple[str, int, str], str] = {}
"""By kernel and the key of its table: on what the entry was measured."""
