"""What token ids say: which rows count, and what a part of the vocabulary knows them by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def live_rows(token_ids: Tensor, mask: Tensor | None) -> Tensor:
    """Which rows count: bool, of the shape of the ids."""
    return token_ids >= 0 if mask is None else (token_ids >= 0) & mask


def ignored_id(op: str, ignore_index: Any, dtype: torch.dtype) -> int:
    """The option `ignore_index` of a loss, checked; -1, which never counts, where no id of this dtype can equal it."""
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"{op}: ignore_index must be an int, got {type(ignore_index).__name__}")
    return ignore_index if 0 <= ignore_index <= torch.iinfo(dtype).max else -1


def part_ids(token_ids: Tensor, start: int, end: int, absent: int) -> Tensor:
    """The ids relative to the part [start, end) of a vocabulary; `absent` for those outside. Negative ones stay."""
    inside = (token_ids >= start) & (token_ids < end)
    return torch.where(token_ids < 0, token_ids, torch.where(inside, token_ids - start, absent))
