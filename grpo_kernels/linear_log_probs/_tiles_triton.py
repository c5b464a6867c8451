"""Tiles of logits, as the forward and the backward both form them."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from grpo_kernels._gemm_triton import dot, nothing
from grpo_kernels._math_triton import tanh


@triton.jit
def is_live(token_ids, mask, row, rows, HAS_MASK: tl.constexpr):
    """(token id, whether the row counts); rows behind the last one do not."""
    token_id = tl.load(token_ids + row, mask=row < rows, other=-1)
    live = token_id >= 0
    if HAS_MASK:
        live = live & (tl.load(mask + row, mask=row < rows, other=0) != 0)
    return token_id, live


@triton.jit
def factors(in_factor, in_low, out_factor, temperatures, row, rows, TEMPERATURE: tl.constexpr):
    """z = out * y, y = x * in or tanh(x * in), out > 0. TEMPERATURE: 0 is in out_factor, 1 one value, 2 one a row."""
    if TEMPERATURE == 1:
        out_factor = tl.div_rn(out_factor, tl.load(temperatures))
    if TEMPERATURE == 2:
        out_factor = tl.div_rn(out_factor, tl.load(temperatures + row, mask=row < rows, other=1.0))
    out_factor = out_factor + tl.zeros(row.shape, tl.float32)
    sign = tl.where(out_factor < 0.0, -1.0, 1.0)
    return in_factor * sign, in_low * sign, out_factor * sign


@triton.jit
def source(base, rows, width, stride, TMA: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """What `product` loads a matrix from: a descriptor for the TMA unit, or the address."""
    if TMA:
        found = tl.make_tensor_descriptor(base, [rows, width], [stride, 1], [BLOCK, BLOCK_K])
    else:
        found = base
    return found


@triton.jit
def product(
    x_source,
    w_source,
    x_start,
    w_start,
    x_rows,
    w_rows,
    width,
    x_stride,
    w_stride,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[BLOCK_M, BLOCK_N] float32 of x w^T. Rows behind the last one and columns behind the width count as zeros."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if TMA:
        for k in range(0, width, BLOCK_K):
            x = x_source.load([x_start, k])
            w = w_source.load([w_start, k])
            acc = dot(x, w.T, acc, PRECISION)
    else:
        x_row = tl.arange(0, BLOCK_M)[:, None] + nothing(w_start)
        w_row = tl.arange(0, BLOCK_N)[:, None] + nothing(w_start)
        inner = tl.arange(0, BLOCK_K)[None, :]
        x_offset = x_row * x_stride + inner  # within the tile 32 bits do
        w_offset = w_row * w_stride + inner
        x_base = x_source + tl.cast(x_start, tl.int64) * x_stride
        w_base = w_source + tl.cast(w_start, tl.int64) * w_stride
        for k in range(0, width, BLOCK_K):
            x = tl.load(x_base + k + x_offset, mask=(x_row < x_rows - x_start) & (inner < width - k), other=0.0)
            w = tl.load(w_base + k + w_offset, mask=(w_row < w_rows - w_start) & (inner < width - k), other=0.0)
            acc = dot(x, w.T, acc, PRECISION)
    return acc


@triton.jit
def add_lora(
    acc,
    projected,
    lora_b,
    x_start,
    w_start,
    x_rows,
    w_rows,
    rank,
    lora_stride,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """acc + projected b^T. `projected` [PARTS, N, rank] holds float32 numbers as sums of PARTS numbers of b's dtype."""
    x_row = tl.arange(0, BLOCK_M)[:, None] + nothing(w_start)
    w_row = tl.arange(0, BLOCK_N)[:, None] + nothing(w_start)
    inner = tl.arange(0, BLOCK_R)[None, :]
    part = tl.cast(x_rows, tl.int64) * rank
    x_base = projected + tl.cast(x_start, tl.int64) * rank
    w_base = lora_b + tl.cast(w_start, tl.int64) * lora_stride
    for k in tl.range(0, rank, BLOCK_R, num_stages=1):
        w = tl.load(
            w_base + k + (w_row * lora_stride + inner),
            mask=(w_row < w_rows - w_start) & (inner < rank - k),
            other=0.0,
        )
        for index in tl.static_range(PARTS):
            x = tl.load(
                x_base + (part * index + k) + (x_row * rank + inner),
                mask=(x_row < x_rows - x_start) & (inner < rank - k),
                other=0.0,
            )
            acc = dot(x, w.T, acc, PRECISION)
    return acc


@triton.jit
def transformed(x, bias, column, vocab, in_factor, in_low, HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr):
    """y of a tile of products: bias, logit scale and softcap. Infinities and NaN keep their meaning through the cap."""
    if HAS_BIAS:
        x += tl.load(bias + column, mask=column < vocab, other=0.0).to(tl.float32)[None, :]
    y = x * in_factor[:, None]
    if CAPPED:  # in_low is what in_factor lost when it was rounded
        y = tl.where(tl.abs(x) < float("inf"), tanh(x * in_low[:, None] + y), y)
    return y
