"""Rows that kernels can read where they lie."""

from __future__ import annotations

from torch import Tensor


def dense_rows(values: Tensor) -> Tensor:
    """[N, H] values whose last axis is dense, copied where it is not."""
    return values if values.stride(1) == 1 or values.shape[1] <= 1 else values.contiguous()
