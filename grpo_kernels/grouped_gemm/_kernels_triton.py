"""The Triton kernels of grouped_gemm."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from grpo_kernels._gemm_triton import dot, pieces, position
from grpo_kernels.grouped_gemm._tiles_triton import (
    product,
    rows_source,
    segment,
    segment_ends,
    weight_source,
)


@triton.jit(do_not_specialize=["rows", "experts", "group"])
def grouped_kernel(
    x,
    weight,
    offsets,
    bias,
    out,
    rows,
    columns,
    width,
    experts,
    x_stride,
    stride_e,
    stride_n,
    stride_k,
    group,
    LOADS: tl.constexpr,
    TURNED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PIECES: tl.constexpr,
):
    # A work item is one tile of the result: up to BLOCK_M rows of one expert by BLOCK_N columns; a program takes every
    # num_programs-th one. Which expert a tile belongs to follows from the offsets, which every program reads once and
    # holds: SEGMENTS row ends and counts of tiles. The rows of no expert are the last segment: their product has depth 0.
    # A tile's sum stays in float32 registers and is written once. Read: x once for each block of columns, a weight once
    # for each block of its rows; 2 K operations an element.
    x_source = rows_source(x, rows, width, x_stride, LOADS, BLOCK_M, BLOCK_K)
    w_source = weight_source(
        weight, experts, columns, width, stride_e, stride_n, stride_k, LOADS, TURNED, BLOCK_N, BLOCK_K
    )
    row_ends = segment_ends(offsets, 0, experts, rows, SEGMENTS)
    tiles = tl.cdiv(row_ends - segment_ends(offsets, 1, experts, rows, SEGMENTS), BLOCK_M)
    tile_ends = tl.cumsum(tiles, axis=0)
    row_blocks = tl.sum(tiles, axis=0)
    column_blocks = tl.cdiv(columns, BLOCK_N)
    for item in range(tl.program_id(0), row_blocks * column_blocks, tl.num_programs(0)):
        row_block, column_block = position(item, row_blocks, column_blocks, group)
        before = tile_ends <= row_block
        expert = tl.sum(before.to(tl.int32), axis=0)
        first_block = tl.max(tl.where(before, tile_ends, 0), axis=0)
        first_row = tl.max(tl.where(before, row_ends, 0), axis=0)
        row_end = tl.min(tl.where(before, rows, row_ends), axis=0)
        row_start = first_row + (row_block - first_block) * BLOCK_M
        depth = tl.where(expert < experts, width, 0)
        expert = tl.minimum(expert, experts - 1)
        column_start = column_block * BLOCK_N
        acc = product(
            x_source, w_source, row_start, row_end, expert, column_start, columns, width, depth, x_stride,
            stride_e, stride_n, stride_k, LOADS, TURNED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        down = tl.arange(0, BLOCK_M)[:, None]
        base = out + tl.cast(row_start, tl.int64) * columns
        bias_base = bias + tl.cast(expert, tl.int64) * columns if HAS_BIAS else bias
        panels = pieces(acc, PIECES)
        for piece in tl.static_range(PIECES):
            value = panels[piece]
            column = column_start + piece * (BLOCK_N // PIECES) + tl.arange(0, BLOCK_N // PIECES)
            if HAS_BIAS:
                value += tl.load(bias_base + column, mask=(column < columns) & (depth > 0), other=0.0).to(tl.float32)
            inside = (down < row_end - row_start) & (column < columns)[None, :]
            tl.store(base + (down * columns + column[None, :]), value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "experts"])
def wgrad_kernel(
    x,
    grad,
    offsets,
    out,
    rows,
    columns,
    width,
    experts,
    x_stride,
    grad_stride,
    stride_e,
    stride_n,
    LOADS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PIECES: tl.constexpr,
):
    # A work item is one tile of one expert's gradient; a program takes every num_programs-th one. It goes through the
    # expert's rows in their order, BLOCK_R at a time, with the sum in float32 registers, and writes the tile once, or
    # adds it to the accumulator: zeros where the expert has no rows. Rows of others never enter, since 0 * NaN is NaN:
    # the TMA unit gives zeros behind the end of a matrix, so that the matrix ends where the segment does; loads without
    # it are masked. Read: the segment of x once for each block of columns, that of grad once for each block of x's.
    column_blocks = tl.cdiv(columns, BLOCK_N)
    blocks = column_blocks * tl.cdiv(width, BLOCK_K)
    for item in range(tl.program_id(0), experts * blocks, tl.num_programs(0)):
        expert = item // blocks
        column_start = item % blocks % column_blocks * BLOCK_N
        width_start = item % blocks // column_blocks * BLOCK_K
        first, end = segment(offsets, expert, experts, rows, SEGMENTS)
        acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        column = column_start + tl.arange(0, BLOCK_N)
        inner = width_start + tl.arange(0, BLOCK_K)
        if LOADS == "tma":
            grad_rows = tl.make_tensor_descriptor(
                grad, [tl.maximum(end, 1), columns], [grad_stride, 1], [BLOCK_R, BLOCK_N]
            )
            x_rows = tl.make_tensor_descriptor(x, [tl.maximum(end, 1), width], [x_stride, 1], [BLOCK_R, BLOCK_K])
            for row in range(first, end, BLOCK_R):
                g = grad_rows.load([row, column_start])
                acc = dot(g.T, x_rows.load([row, width_start]), acc, PRECISION)
        else:
            across = tl.arange(0, BLOCK_R)[None, :]
            down = tl.arange(0, BLOCK_R)[:, None]
            for row in range(first, end, BLOCK_R):
                g = tl.load(
                    grad + tl.cast(row, tl.int64) * grad_stride + (across * grad_stride + column[:, None]),
                    mask=(across < end - row) & (column < columns)[:, None],
                    other=0.0,
                )
                v = tl.load(
                    x + tl.cast(row, tl.int64) * x_stride + (down * x_stride + inner[None, :]),
                    mask=(down < end - row) & (inner < width)[None, :],
                    other=0.0,
                )
                acc = dot(g, v, acc, PRECISION)
        down = tl.arange(0, BLOCK_N)[:, None]
        base = out + tl.cast(expert, tl.int64) * stride_e + tl.cast(column_start, tl.int64) * stride_n
        panels = pieces(acc, PIECES)
        for piece in tl.static_range(PIECES):
            value = panels[piece]
            right = width_start + piece * (BLOCK_K // PIECES) + tl.arange(0, BLOCK_K // PIECES)
            place = base + (down * stride_n + right[None, :])
            inside = (down < columns - column_start) & (right < width)[None, :]
            if ACCUMULATE:
                inside = inside & (first < end)
                value += tl.load(place, mask=inside, other=0.0)
            tl.store(place, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "experts"])
def row_sum_kernel(
    grad,
    offsets,
    out,
    rows,
    columns,
    experts,
    stride,
    SEGMENTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # One program owns BLOCK_N columns of one expert and adds up its rows in their order: BLOCK_R running sums a column,
    # which are added at the end. Reads every element once.
    expert = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    first, end = segment(offsets, expert, experts, rows, SEGMENTS)
    total = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    down = tl.arange(0, BLOCK_R)[:, None]
    for row in range(first, end, BLOCK_R):
        total += tl.load(
            grad + tl.cast(row, tl.int64) * stride + (down * stride + column[None, :]),
            mask=(down < end - row) & (column < columns)[None, :],
            other=0.0,
        ).to(tl.float32)
    place = out + tl.cast(expert, tl.int64) * columns + column
    tl.store(place, tl.sum(total, axis=0), mask=column < columns)


@triton.jit(do_not_specialize=["rows", "experts"])
def ends_kernel(offsets, ends, rows, experts, SEGMENTS: tl.constexpr):
    # One program: the offsets as end rows that lie within the rows and do not decrease, for a library that believes them.
    expert = tl.arange(0, SEGMENTS)
    tl.store(ends + expert, segment_ends(offsets, 0, experts, rows, SEGMENTS), mask=expert < experts)


@triton.jit(do_not_specialize=["rows", "experts"])
def clear_tail_kernel(out, ends, rows, columns, experts, BLOCK: tl.constexpr):
    # Programs take the rows of no expert in turn and write zeros: those rows once, nothing else.
    last = tl.load(ends + experts - 1)
    for row in range(last + tl.program_id(0), rows, tl.num_programs(0)):
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            place = out + tl.cast(row, tl.int64) * columns + column
            tl.store(place, tl.zeros((BLOCK,), out.dtype.element_ty), mask=column < columns)


@triton.jit(do_not_specialize=["experts"])
def clear_empty_kernel(out, ends, experts, size, BLOCK: tl.constexpr):
    # All programs go through the experts; of one without rows each writes zeros into its share of `size` elements.
    first = 0
    for expert in range(0, experts):
        end = tl.load(ends + expert)
        if end == first:
            base = out + tl.cast(expert, tl.int64) * size
            for start in range(tl.program_id(0) * BLOCK, size, tl.num_programs(0) * BLOCK):
                place = start + tl.arange(0, BLOCK)
                tl.store(base + place, tl.zeros((BLOCK,), out.dtype.element_ty), mask=place < size)
        first = end
