"""The Triton kernels that quantise tokens on the way to the rows of their experts, and how they cut a token."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from grpo_kernels._fp8_triton import encode, magnitude, scaled, tile_scale, write_tiles

TILE = tl.constexpr(128)
_THREADS_OF_A_TILE = 8  # 16 elements each, and 16 bytes of codes


class QuantizeConfig(NamedTuple):
    """How the kernel cuts a token. Depends on H and K alone; no result depends on it."""

    tiles: int  # of a program
    slots: int  # slots that are worked on together
    num_warps: int


def quantize_config(hidden: int, top_k: int) -> QuantizeConfig:
    """Up to 64 threads: widths such as 2880 and 7168 leave few of them idle."""
    tiles = min(8, max(4, triton.next_power_of_2(triton.cdiv(max(hidden, 1), 128))))
    return QuantizeConfig(tiles, min(8, triton.next_power_of_2(max(top_k, 1))), tiles * _THREADS_OF_A_TILE // 32)


@triton.jit
def _write_empty(
    inv_map, data, scale, block, rows, slots, tile, column, hidden, data_stride, scale_stride, eps,
    POWER_OF_TWO: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Zeros, and the scale of tiles of zeros, in those among ROWS rows that are padding, or of none of the slots."""
    first = block.to(tl.int64) * ROWS
    index = first + tl.arange(0, ROWS)
    slot = tl.load(inv_map + index, mask=index < rows, other=0)
    outside = (slot < 0) | (slot >= slots)
    if tl.max(outside.to(tl.int32), axis=0) > 0:
        code = tl.zeros(column.shape, tl.uint8)
        found, _ = tile_scale(tl.zeros(tile.shape, tl.int32), eps, POWER_OF_TWO)
        for row in range(first, tl.minimum(first + ROWS, rows)):
            slot_of_row = tl.load(inv_map + row)
            if (slot_of_row < 0) | (slot_of_row >= slots):
                tl.store(data + row * data_stride + column, code, mask=column < hidden)
                tl.store(scale + tile.to(tl.int64) * scale_stride + row, found, mask=tile * TILE < hidden)


@triton.jit(do_not_specialize=["tokens", "rows", "top_k", "scale_stride"])
def permute_quantize_kernel(
    x,
    row_id_map,
    inv_map,
    data,
    scale,
    tokens,
    rows,
    top_k,
    hidden,
    x_stride,
    data_stride,
    scale_stride,
    eps,
    POWER_OF_TWO: tl.constexpr,
    ENCODE: tl.constexpr,
    SLOTS: tl.constexpr,
    PADDING: tl.constexpr,
    TILES: tl.constexpr,
):
    # Program (t, c) owns TILES tiles of token t: reads and encodes them once, 16 bytes a thread, and writes codes and
    # scales into the token's K rows. Behind the tokens, program (tokens + p, c) empties those tiles of the rows among
    # PADDING that are padding. Of bf16: 2 + 1.03 K bytes an element of a token.
    program = tl.program_id(0)
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    column = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    if program < tokens:
        token = program.to(tl.int64)
        inside = column < hidden
        value = tl.load(x + token * x_stride + column, mask=inside, other=0.0)
        found, factor = tile_scale(tl.max(magnitude(value), axis=1), eps, POWER_OF_TWO)
        code = encode(scaled(value, factor[:, None], POWER_OF_TWO), ENCODE)
        for base in range(0, top_k, SLOTS):
            for j in tl.static_range(SLOTS):
                slot = token * top_k + (base + j)
                row = tl.load(row_id_map + slot, mask=base + j < top_k, other=-1).to(tl.int64)
                live = (row >= 0) & (row < rows)
                tl.store(data + row * data_stride + column, code, mask=inside & live)
                tl.store(scale + tile.to(tl.int64) * scale_stride + row, found, mask=(tile * TILE < hidden) & live)
    else:
        slots = tokens.to(tl.int64) * top_k
        _write_empty(
            inv_map, data, scale, program - tokens, rows, slots, tile, column, hidden, data_stride, scale_stride, eps,
            POWER_OF_TWO, PADDING,
        )  # fmt: skip


@triton.jit(do_not_specialize=["slots", "top_k", "scale_stride", "scale_t_stride"])
def gather_quantize_kernel(
    x,
    inv_map,
    data,
    scale,
    data_t,
    scale_t,
    rows,
    slots,
    top_k,
    hidden,
    x_stride,
    data_stride,
    scale_stride,
    data_t_stride,
    scale_t_stride,
    eps,
    POWER_OF_TWO: tl.constexpr,
    ENCODE: tl.constexpr,
):
    # A program owns 128 columns of 128 rows, all of one expert: gathers the tokens' tiles, 16 bytes a thread, with zeros
    # for padding, and writes their codes and, turned through shared memory, those of the columns, each with their scales.
    # 4.06 bytes an element of bf16 rows.
    across = tl.cdiv(hidden, TILE)
    program = tl.program_id(0)
    block, tile = program // across, program % across
    row = block.to(tl.int64) * TILE + tl.arange(0, TILE)
    column = tile * TILE + tl.arange(0, TILE)
    slot = tl.load(inv_map + row, mask=row < rows, other=-1)
    live = (slot >= 0) & (slot < slots)
    token = (slot // top_k).to(tl.int64)
    inside = live[:, None] & (column < hidden)[None, :]
    value = tl.load(x + token[:, None] * x_stride + column[None, :], mask=inside, other=0.0)
    write_tiles(
        value, data, scale, row, column, rows, hidden, data_stride, scale_stride, tile, eps, 1, POWER_OF_TWO, ENCODE
    )
    write_tiles(
        value, data_t, scale_t, column, row, hidden, rows, data_t_stride, scale_t_stride, block, eps, 0,
        POWER_OF_TWO, ENCODE,
    )  # fmt: skip
