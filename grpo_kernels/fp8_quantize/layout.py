"""Memory formats of quantised tensors: what a grouped product loads without another copy. Imports torch alone."""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 128
"""Elements of K, and for square blocks rows as well, that share a scale."""
DATA_DTYPE = torch.float8_e4m3fn


def tiles(size: int) -> int:
    """How many tiles a length is cut into; the last one may be narrower."""
    return (size + TILE - 1) // TILE


def aligned(size: int, multiple: int) -> int:
    """The size, up to a multiple."""
    return (size + multiple - 1) // multiple * multiple


def empty_data(like: Tensor, batch: tuple[int, ...], rows: int, width: int) -> Tensor:
    """[*batch, rows, width] e4m3, not yet written: dense rows that are a multiple of 16 bytes apart.

    What lies between the rows belongs to nobody: it is neither written nor read.
    """
    stride = aligned(width, 16)
    strides = (rows * stride, stride, 1)[1 - len(batch) :]
    return like.new_empty_strided((*batch, rows, width), strides, dtype=DATA_DTYPE)


def empty_scale(like: Tensor, batch: tuple[int, ...], rows: int, width: int, square: bool) -> Tensor:
    """The scale of such data, float32, not yet written.

    One for every row and tile: [*batch, rows, tiles(width)], rows adjacent in memory, columns a multiple of 16 bytes
    apart; what lies behind a column's last row belongs to nobody: it is neither written nor read. Square: [*batch,
    tiles(rows), tiles(width)], contiguous.
    """
    columns = tiles(width)
    if square:
        return like.new_empty((*batch, tiles(rows), columns), dtype=torch.float32)
    stride = aligned(rows, 4)
    strides = (columns * stride, 1, stride)[1 - len(batch) :]
    return like.new_empty_strided((*batch, rows, columns), strides, dtype=torch.float32)


def empty_quantized(
    x: Tensor, square: bool, power_of_two: bool, rows: bool, columns: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The outputs of the op fp8_quantize, not yet written: of x where `rows`, of its transpose where `columns`; [0]
    where not."""
    *leading, height, width = x.shape
    batch = tuple(leading)

    def pair(wanted: bool, rows: int, width: int) -> tuple[Tensor, Tensor]:
        if not wanted:
            return x.new_empty(0, dtype=DATA_DTYPE), x.new_empty(0, dtype=torch.float32)
        return empty_data(x, batch, rows, width), empty_scale(x, batch, rows, width, square)

    return (*pair(rows, height, width), *pair(columns, width, height))


def empty_dequantized(data: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The output of the op fp8_dequantize, not yet written."""
    return data.new_empty(data.shape, dtype=dtype)
