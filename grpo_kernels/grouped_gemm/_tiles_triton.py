"""Segments of rows and tiles of products, as the kernels of grouped_gemm walk and form them."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from grpo_kernels._gemm_triton import dot, nothing


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def segment_ends(offsets, shift, experts, rows, SEGMENTS: tl.constexpr):
    """[SEGMENTS] int32. End row of every expert's segment, `shift` places on; `rows` behind the last expert. Whatever the
    offsets hold, ends lie within the rows and do not decrease: segments are in bounds and apart."""
    index = tl.arange(0, SEGMENTS) - shift
    given = tl.load(offsets + index, mask=(index >= 0) & (index < experts), other=0)
    end = tl.where(index < experts, tl.minimum(tl.maximum(given, 0), rows), rows)
    return tl.associative_scan(tl.where(index < 0, 0, end).to(tl.int32), 0, larger)


@triton.jit
def segment(offsets, expert, experts, rows, SEGMENTS: tl.constexpr):
    """(first row, end row) of an expert, by the same rule."""
    index = tl.arange(0, SEGMENTS)
    given = tl.load(offsets + index, mask=(index <= expert) & (index < experts), other=0)
    end = tl.minimum(tl.maximum(given, 0), rows).to(tl.int32)
    first = tl.max(tl.where(index < expert, end, 0), axis=0)
    return first, larger(first, tl.max(tl.where(index == expert, end, 0), axis=0))


@triton.jit
def rows_source(x, rows, width, stride, LOADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """What rows are loaded from: a descriptor for the TMA unit, or the address."""
    if LOADS == "tma":
        found = tl.make_tensor_descriptor(x, [rows, width], [stride, 1], [BLOCK_M, BLOCK_K])
    else:
        found = x
    return found


@triton.jit
def weight_source(
    weight,
    experts,
    columns,
    width,
    stride_e,
    stride_n,
    stride_k,
    LOADS: tl.constexpr,
    TURNED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The same for the weights. TURNED: their second axis is the dense one."""
    if LOADS == "tma":
        if TURNED:
            found = tl.make_tensor_descriptor(
                weight, [experts, width, columns], [stride_e, stride_k, 1], [1, BLOCK_K, BLOCK_N]
            )
        else:
            found = tl.make_tensor_descriptor(
                weight, [experts, columns, width], [stride_e, stride_n, 1], [1, BLOCK_N, BLOCK_K]
            )
    else:
        found = weight
    return found


@triton.jit
def product(
    x_source,
    w_source,
    row_start,
    row_end,
    expert,
    column_start,
    columns,
    width,
    depth,
    x_stride,
    stride_e,
    stride_n,
    stride_k,
    LOADS: tl.constexpr,
    TURNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[BLOCK_M, BLOCK_N] float32 of x weight^T over the first `depth` of `width` elements. What lies behind the last row
    or column of the tile holds anything."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if LOADS == "tma":
        for k in range(0, depth, BLOCK_K):
            x = x_source.load([row_start, k])
            if TURNED:
                w = w_source.load([expert, k, column_start]).reshape(BLOCK_K, BLOCK_N)
            else:
                w = w_source.load([expert, column_start, k]).reshape(BLOCK_N, BLOCK_K).T
            acc = dot(x, w, acc, PRECISION)
    else:
        row = tl.arange(0, BLOCK_M)[:, None] + nothing(column_start)
        column = tl.arange(0, BLOCK_N)[None, :] + nothing(column_start)
        x_inner = tl.arange(0, BLOCK_K)[None, :]
        w_inner = tl.arange(0, BLOCK_K)[:, None]
        x_base = x_source + tl.cast(row_start, tl.int64) * x_stride
        w_base = w_source + tl.cast(expert, tl.int64) * stride_e + tl.cast(column_start, tl.int64) * stride_n
        x_offset = row * x_stride + x_inner  # within the tile 32 bits do
        w_offset = column * stride_n + w_inner * stride_k
        for k in range(0, depth, BLOCK_K):
            x = tl.load(x_base + k + x_offset, mask=(row < row_end - row_start) & (x_inner < width - k), other=0.0)
            w = tl.load(
                w_base + tl.cast(k, tl.int64) * stride_k + w_offset,
                mask=(column < columns - column_start) & (w_inner < width - k),
                other=0.0,
            )
            acc = dot(x, w, acc, PRECISION)
    return acc
