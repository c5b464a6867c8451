"""Checks of what only the data shows."""

from __future__ import annotations

from torch import Tensor


def segment_ends(op: str, offsets: Tensor, rows: int) -> list[int]:
    """The end row of every expert's segment, read on the CPU.

    Raises:
        ValueError: one is below the one before it, or beyond the last row.
    """
    ends: list[int] = offsets.tolist()
    before = 0
    for expert, end in enumerate(ends):
        if not before <= end <= rows:
            wanted = f">= {before}, where the segment begins, and <= R = {rows}"
            raise ValueError(f"{op}: offsets[{expert}] must be {wanted}, got {end}")
        before = end
    return ends
