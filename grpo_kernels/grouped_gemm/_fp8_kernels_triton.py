"""The Triton kernels of grouped_gemm for FP8 operands."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from grpo_kernels._fp8_triton import decode
from grpo_kernels._gemm_triton import nothing, pieces, position
from grpo_kernels.grouped_gemm._tiles_triton import rows_source, segment_ends, weight_source

TABLE_ENTRY = tl.constexpr(4)
"""Numbers of an entry of the table: expert, first row, end row, and one that is not used."""


@triton.jit(do_not_specialize=["rows", "experts"])
def tile_table_kernel(
    offsets, table, rows, experts, SEGMENTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr
):
    # One program for each expert, and one for the rows behind them, whose expert is -1: it writes the tiles of its
    # segment, in order, at their places in the table. The last one writes in the first entry how many tiles there are.
    # Every program reads the offsets and adds up the tiles of the segments before its own.
    segment = tl.program_id(0)
    index = tl.arange(0, SEGMENTS)
    ends = segment_ends(offsets, 0, experts, rows, SEGMENTS)
    starts = segment_ends(offsets, 1, experts, rows, SEGMENTS)
    tiles = tl.cdiv(ends - starts, BLOCK_M)
    before = tl.sum(tl.where(index < segment, tiles, 0), axis=0)
    own = tl.sum(tl.where(index == segment, tiles, 0), axis=0)
    start = tl.max(tl.where(index == segment, starts, 0), axis=0)
    end = tl.max(tl.where(index == segment, ends, 0), axis=0)
    if segment == experts:
        tl.store(table, before + own)
    for first in range(0, own, BLOCK):
        tile = first + tl.arange(0, BLOCK)
        row = start + tile * BLOCK_M
        entry = table + (1 + before + tile) * TABLE_ENTRY
        mask = tile < own
        tl.store(entry, tl.where(segment < experts, segment, -1), mask=mask)
        tl.store(entry + 1, row, mask=mask)
        tl.store(entry + 2, row + tl.minimum(BLOCK_M, end - row), mask=mask)


@triton.jit
def fp8_dot(a, b, PRECISION: tl.constexpr):
    """a b in float32. PRECISION "interpreted": the interpreter would multiply the codes."""
    if PRECISION == "interpreted":
        wide_a = decode(a.to(tl.uint8, bitcast=True), "integer")
        found = tl.dot(wide_a, decode(b.to(tl.uint8, bitcast=True), "integer"))
    else:
        found = tl.dot(a, b)
    return found


@triton.jit(do_not_specialize=["rows", "experts", "group"])
def fp8_grouped_kernel(
    x,
    x_scale,
    weight,
    weight_scale,
    table,
    bias,
    out,
    rows,
    columns,
    width,
    experts,
    x_stride,
    x_scale_row,
    x_scale_tile,
    stride_e,
    stride_n,
    w_scale_e,
    w_scale_n,
    w_scale_tile,
    group,
    LOADS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    SPECIALIZED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    PIECES: tl.constexpr,
):
    # A work item is one tile of the result: up to BLOCK_M rows of one expert, by the table, and TILE columns, whose
    # weights share a scale; a program takes every num_programs-th one. SPECIALIZED: one group of its warps only loads.
    # The tensor core sums TILE products, with fewer bits than float32 has; such a sum is scaled, by its row's scale and
    # then by its block's, since the product of both could underflow, and added to a float32 sum in registers.
    # Read: a row and its scales once for each block of columns, a weight once for each block of its rows.
    x_source = rows_source(x, rows, width, x_stride, LOADS, BLOCK_M, TILE)
    w_source = weight_source(weight, experts, columns, width, stride_e, stride_n, 1, LOADS, False, TILE, TILE)
    row_blocks = tl.load(table)
    column_blocks = tl.cdiv(columns, TILE)
    for item in tl.range(
        tl.program_id(0), row_blocks * column_blocks, tl.num_programs(0), warp_specialize=SPECIALIZED
    ):  # fmt: skip
        row_block, column_block = position(item, row_blocks, column_blocks, group)
        entry = table + (1 + row_block) * TABLE_ENTRY
        owner = tl.load(entry)
        row_start = tl.load(entry + 1)
        live = tl.load(entry + 2) - row_start
        expert = tl.maximum(owner, 0)
        depth = tl.where(owner < 0, 0, width)
        column_start = column_block * TILE
        row = tl.arange(0, BLOCK_M)
        scale_a = x_scale + tl.cast(row_start, tl.int64) * x_scale_row + row * x_scale_row
        scale_b = weight_scale + tl.cast(expert, tl.int64) * w_scale_e + tl.cast(column_block, tl.int64) * w_scale_n
        acc = tl.zeros((BLOCK_M, TILE), tl.float32)
        for k in range(0, depth, TILE):
            place = tl.cast(k // TILE, tl.int64)
            if LOADS == "tma":
                a = x_source.load([row_start, k])
                b = w_source.load([expert, column_start, k]).reshape(TILE, TILE).T
            else:
                inner = tl.arange(0, TILE)
                down = row[:, None] + nothing(column_start)
                across = inner[None, :] + nothing(column_start)
                a = tl.load(
                    x_source + tl.cast(row_start, tl.int64) * x_stride + k + (down * x_stride + inner[None, :]),
                    mask=(down < live) & (inner[None, :] < width - k),
                    other=0.0,
                )
                b = tl.load(
                    w_source + tl.cast(expert, tl.int64) * stride_e + tl.cast(column_start, tl.int64) * stride_n + k
                    + (across * stride_n + inner[:, None]),
                    mask=(across < columns - column_start) & (inner[:, None] < width - k),
                    other=0.0,
                )  # fmt: skip
            of_rows = tl.load(scale_a + place * x_scale_tile, mask=row < live, other=0.0)
            of_block = tl.load(scale_b + place * w_scale_tile)
            acc += fp8_dot(a, b, PRECISION) * of_rows[:, None] * of_block
        base = out + tl.cast(row_start, tl.int64) * columns
        bias_base = bias + tl.cast(expert, tl.int64) * columns if HAS_BIAS else bias
        panels = pieces(acc, PIECES)
        for piece in tl.static_range(PIECES):
            value = panels[piece]
            column = column_start + piece * (TILE // PIECES) + tl.arange(0, TILE // PIECES)
            if HAS_BIAS:
                value += tl.load(bias_base + column, mask=(column < columns) & (owner >= 0), other=0.0).to(tl.float32)
            inside = (row < live)[:, None] & (column < columns)[None, :]
            place = base + (row[:, None] * columns + column[None, :])
            tl.store(place, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "experts"])
def fp8_wgrad_kernel(
    x,
    x_scale,
    grad,
    grad_scale,
    ends,
    out,
    rows,
    columns,
    width,
    experts,
    x_stride,
    x_scale_row,
    x_scale_tile,
    grad_stride,
    grad_scale_row,
    grad_scale_tile,
    stride_e,
    stride_n,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    SPECIALIZED: tl.constexpr,
    TILE: tl.constexpr,
    PIECES: tl.constexpr,
):
    # A work item is one TILE x TILE part of one expert's gradient; a program takes every num_programs-th one. It goes
    # through the expert's rows in their order, TILE at a time, which share a scale in every row of both transposed
    # operands, with the sum in float32 registers, and writes the part once, or adds it to the accumulator: zeros where
    # the expert has no rows, NaN where its segment does not begin and end with a tile. Read: the segment of x once for
    # each block of columns, that of grad once for each block of x's.
    x_source = tl.make_tensor_descriptor(x, [width, rows], [x_stride, 1], [TILE, TILE])
    grad_source = tl.make_tensor_descriptor(grad, [columns, rows], [grad_stride, 1], [TILE, TILE])
    column_blocks = tl.cdiv(columns, TILE)
    blocks = column_blocks * tl.cdiv(width, TILE)
    for item in tl.range(tl.program_id(0), experts * blocks, tl.num_programs(0), warp_specialize=SPECIALIZED):
        expert = item // blocks
        column_start = item % blocks % column_blocks * TILE
        width_start = item % blocks // column_blocks * TILE
        first = tl.load(ends + tl.maximum(expert - 1, 0))
        first = tl.where(expert == 0, 0, first)
        end = tl.load(ends + expert)
        whole = (first % TILE == 0) & ((end % TILE == 0) | (end == rows))
        column = column_start + tl.arange(0, TILE)
        inner = width_start + tl.arange(0, TILE)
        acc = tl.zeros((TILE, TILE), tl.float32)
        for row in range(first, tl.where(whole, end, first), TILE):
            place = tl.cast(row // TILE, tl.int64)
            g = grad_source.load([column_start, row])
            v = x_source.load([width_start, row])
            of_columns = tl.load(
                grad_scale + place * grad_scale_tile + column * grad_scale_row, mask=column < columns, other=0.0
            )
            of_inner = tl.load(x_scale + place * x_scale_tile + inner * x_scale_row, mask=inner < width, other=0.0)
            acc += fp8_dot(g, v.T, PRECISION) * of_columns[:, None] * of_inner[None, :]
        fault = tl.where(whole | (first == end), 0.0, float("nan"))
        down = tl.arange(0, TILE)[:, None]
        base = out + tl.cast(expert, tl.int64) * stride_e + tl.cast(column_start, tl.int64) * stride_n
        panels = pieces(acc, PIECES)
        for piece in tl.static_range(PIECES):
            value = panels[piece] + fault
            right = width_start + piece * (TILE // PIECES) + tl.arange(0, TILE // PIECES)
            place = base + (down * stride_n + right[None, :])
            inside = (down < columns - column_start) & (right < width)[None, :]
            if ACCUMULATE:
                inside = inside & (first < end)
                value += tl.load(place, mask=inside, other=0.0)
            tl.store(place, value.to(out.dtype.element_ty), mask=inside)
