"""The Triton kernels that quantise and dequantise, and how they cut a matrix."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from grpo_kernels._fp8_triton import decode, encode, magnitude, scaled, tile_scale, write_tiles

TILE = tl.constexpr(128)


class LaunchConfig(NamedTuple):
    """The piece of a matrix that a program owns. No result depends on it."""

    rows: int
    columns: int
    num_warps: int


def launch_config(square: bool, rows: bool, columns: bool) -> LaunchConfig:
    """Whole tiles. Where they lie along rows alone a few rows are enough to fill a multiprocessor with loads.

    Args:
        square: tiles of 128x128.
        rows: whether the matrix itself is wanted.
        columns: whether its transpose is wanted.
    """
    if not square and not columns:
        return LaunchConfig(32, 128, 4)
    if not square and not rows:
        return LaunchConfig(128, 64, 4)
    return LaunchConfig(128, 128, 8)


@triton.jit
def _place(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(batch, first row, first column) of a program, 64 bits. Neighbours have neighbouring columns: they share pages."""
    across = tl.cdiv(columns, COLUMNS)
    down = tl.cdiv(rows, ROWS)
    program = tl.program_id(0)
    rest = program // across
    return (rest // down).to(tl.int64), (rest % down).to(tl.int64) * ROWS, (program % across) * COLUMNS


@triton.jit(do_not_specialize=["rows", "scale_stride"])
def quantize_rows_kernel(
    x,
    data,
    scale,
    rows,
    columns,
    x_batch,
    x_stride,
    data_stride,
    scale_stride,
    eps,
    POWER_OF_TWO: tl.constexpr,
    ENCODE: tl.constexpr,
    ROWS: tl.constexpr,
):
    # A program owns ROWS rows of one tile's width: reads them once, 16 bytes a thread, keeps them in registers, writes the
    # codes and one scale a row, the scales of neighbouring rows side by side. 3.03 bytes an element of bf16.
    batch, first, start = _place(rows, columns, ROWS, TILE)
    row = first + tl.arange(0, ROWS)
    column = start + tl.arange(0, TILE)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    value = tl.load(x + batch * x_batch + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0)
    data += batch * rows * data_stride
    scale += batch * tl.cdiv(columns, TILE) * scale_stride
    tile = start // TILE
    write_tiles(
        value, data, scale, row, column, rows, columns, data_stride, scale_stride, tile, eps, 1, POWER_OF_TWO, ENCODE
    )


@triton.jit(do_not_specialize=["scale_stride", "scale_t_stride"])
def quantize_tiles_kernel(
    x,
    data,
    scale,
    data_t,
    scale_t,
    rows,
    columns,
    x_batch,
    x_stride,
    data_stride,
    scale_stride,
    data_t_stride,
    scale_t_stride,
    eps,
    SQUARE: tl.constexpr,
    ON_ROWS: tl.constexpr,
    ON_COLUMNS: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    ENCODE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # A program owns 128 rows of COLUMNS columns: reads them once, 16 bytes a thread, and writes what is wanted of the codes
    # and, turned through shared memory, of the transpose's codes, each with its scales. Both of bf16: 4.06 bytes an
    # element.
    batch, first, start = _place(rows, columns, TILE, COLUMNS)
    row = first + tl.arange(0, TILE)
    column = start + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    value = tl.load(x + batch * x_batch + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0)
    across, down = tl.cdiv(columns, TILE), tl.cdiv(rows, TILE)
    if ON_ROWS:
        data += batch * rows * data_stride
    if ON_COLUMNS:
        data_t += batch * columns * data_t_stride
    if SQUARE:
        found, factor = tile_scale(tl.max(magnitude(value)), eps, POWER_OF_TWO)
        code = encode(scaled(value, factor, POWER_OF_TWO), ENCODE)
        if ON_ROWS:
            tl.store(data + row[:, None] * data_stride + column[None, :], code, mask=inside)
            tl.store(scale + (batch * down + first // TILE) * across + start // TILE, found)
        if ON_COLUMNS:
            turned = column.to(tl.int64)[:, None] * data_t_stride + row[None, :]
            tl.store(data_t + turned, tl.trans(code), mask=(column < columns)[:, None] & (row < rows)[None, :])
            tl.store(scale_t + (batch * across + start // TILE) * down + first // TILE, found)
    else:
        if ON_ROWS:
            scale += batch * across * scale_stride
            tile = start // TILE
            write_tiles(
                value, data, scale, row, column, rows, columns, data_stride, scale_stride, tile, eps, 1,
                POWER_OF_TWO, ENCODE,
            )  # fmt: skip
        if ON_COLUMNS:
            scale_t += batch * down * scale_t_stride
            tile = first // TILE
            write_tiles(
                value, data_t, scale_t, column, row, columns, rows, data_t_stride, scale_t_stride, tile, eps, 0,
                POWER_OF_TWO, ENCODE,
            )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "scale_batch", "scale_stride_m", "scale_stride_k"])
def dequantize_kernel(
    data,
    scale,
    out,
    rows,
    columns,
    data_batch,
    data_stride,
    scale_batch,
    scale_stride_m,
    scale_stride_k,
    ROW_TILES: tl.constexpr,
    COLUMN_TILES: tl.constexpr,
    ENCODE: tl.constexpr,
    ROWS: tl.constexpr,
):
    # A program owns ROWS rows of one tile's width: reads the codes 16 bytes a thread, and their scales, and writes the
    # products. ROW_TILES, COLUMN_TILES: a scale serves 128 rows, columns; otherwise one. 3.03 bytes an element of bf16.
    batch, first, start = _place(rows, columns, ROWS, TILE)
    row = first + tl.arange(0, ROWS)
    column = start + tl.arange(0, TILE)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    code = tl.load(data + batch * data_batch + row[:, None] * data_stride + column[None, :], mask=inside, other=0)
    line = row // TILE if ROW_TILES else row
    factors = scale + batch * scale_batch + line[:, None] * scale_stride_m
    if COLUMN_TILES:
        factor = tl.load(factors + (start // TILE).to(tl.int64) * scale_stride_k, mask=(row < rows)[:, None], other=0.0)
    else:
        factor = tl.load(factors + column.to(tl.int64)[None, :] * scale_stride_k, mask=inside, other=0.0)
    value = decode(code, ENCODE) * factor
    to = out + (batch * rows + row)[:, None] * columns + column[None, :]
    tl.store(to, value.to(out.dtype.element_ty), mask=inside)
