"""The Triton kernels that move the rows, and how they cut a row."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

PADDING_ROWS = 32
"""Rows whose map a program looks through for padding."""


class LaunchConfig(NamedTuple):
    """How the kernels cut the rows. Depends on H, K, dtype and alignment, so that a token's bits do not depend on others."""

    lanes: int  # threads of a program
    width: int  # elements of a thread: 16 bytes
    slots: int  # slots that are worked on together
    neighbours: bool  # whether a thread's elements lie side by side. Else its neighbours have the next ones
    num_warps: int


def launch_config(hidden: int, top_k: int, element_size: int, aligned: bool = True) -> LaunchConfig:
    """Up to 128 threads with 16 bytes of a row each, and the rows of up to eight slots at a time.

    Args:
        aligned: every row starts at a multiple of 16 bytes, and its length is one of 16 elements.
    """
    width = 16 // element_size
    warps = min(4, triton.next_power_of_2(triton.cdiv(max(hidden, 1), 32 * width)))
    slots = min(8 if aligned else 4, triton.next_power_of_2(max(top_k, 1)))
    return LaunchConfig(32 * warps, width, slots, aligned, warps)


@triton.jit
def _zero_padding(inv_map, out, block, rows, slots, hidden, begin, end, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Columns `begin` to `end` of those among ROWS rows that are padding, or of none of the slots."""
    first = block.to(tl.int64) * ROWS
    index = first + tl.arange(0, ROWS)
    slot = tl.load(inv_map + index, mask=index < rows, other=0)
    outside = (slot < 0) | (slot >= slots)
    if tl.max(outside.to(tl.int32), axis=0) > 0:
        zeros = tl.zeros((BLOCK,), out.dtype.element_ty)
        for row in range(first, tl.minimum(first + ROWS, rows)):
            slot_of_row = tl.load(inv_map + row)
            if (slot_of_row < 0) | (slot_of_row >= slots):
                for start in range(begin, end, BLOCK):
                    columns = start + tl.arange(0, BLOCK)
                    tl.store(out + row * hidden + columns, zeros, mask=columns < end)


@triton.jit(do_not_specialize=["tokens", "rows", "top_k"])
def permute_kernel(
    x,
    row_id_map,
    inv_map,
    topk_weights,
    out,
    tokens,
    rows,
    top_k,
    hidden,
    x_stride,
    WEIGHTED: tl.constexpr,
    SLOTS: tl.constexpr,
    PADDING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Program (t, c) owns block c of token t: reads it once, 16 bytes a thread, and writes it into the token's rows. Behind
    # the tokens, program (tokens + p, c) zeroes block c of those among PADDING rows that are padding. K + 1 rows of traffic a
    # token; no program waits for another.
    program = tl.program_id(0)
    begin = tl.program_id(1) * BLOCK
    if program < tokens:
        columns = begin + tl.arange(0, BLOCK)
        inside = columns < hidden
        token = program.to(tl.int64)
        value = tl.load(x + token * x_stride + columns, mask=inside, other=0.0)
        for base in range(0, top_k, SLOTS):
            for j in tl.static_range(SLOTS):
                slot = token * top_k + (base + j)
                row = tl.load(row_id_map + slot, mask=base + j < top_k, other=-1).to(tl.int64)
                live = (row >= 0) & (row < rows)
                scaled = value
                if WEIGHTED:
                    weight = tl.load(topk_weights + slot, mask=live, other=0.0)
                    scaled = (value.to(tl.float32) * weight).to(out.dtype.element_ty)
                tl.store(out + row * hidden + columns, scaled, mask=inside & live)
    else:
        end = tl.minimum(begin + BLOCK, hidden)
        _zero_padding(
            inv_map, out, program - tokens, rows, tokens.to(tl.int64) * top_k, hidden, begin, end, PADDING, BLOCK
        )


@triton.jit(do_not_specialize=["rows", "top_k"])
def unpermute_kernel(
    y,
    row_id_map,
    topk_weights,
    out,
    rows,
    top_k,
    hidden,
    y_stride,
    WEIGHTED: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Program (t, c) owns block c of token t: adds its rows in fp32 registers, in the order of the slots, and writes once.
    # The loads of SLOTS rows are under way together. K + 1 rows of traffic a token; rows that are padding are not read.
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < hidden
    total = tl.zeros((BLOCK,), tl.float32)
    for base in range(0, top_k, SLOTS):
        for j in tl.static_range(SLOTS):
            slot = token * top_k + (base + j)
            row = tl.load(row_id_map + slot, mask=base + j < top_k, other=-1).to(tl.int64)
            live = (row >= 0) & (row < rows)
            value = tl.load(y + row * y_stride + columns, mask=inside & live, other=0.0).to(tl.float32)
            if WEIGHTED:
                value = value * tl.load(topk_weights + slot, mask=live, other=0.0)
            total += value
    tl.store(out + token * hidden + columns, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "rows", "top_k"])
def unpermute_backward_kernel(
    grad,
    y,
    row_id_map,
    inv_map,
    topk_weights,
    grad_y,
    grad_weights,
    tokens,
    rows,
    top_k,
    hidden,
    grad_stride,
    y_stride,
    SLOTS: tl.constexpr,
    PADDING: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
):
    # Program (t, s) owns SLOTS slots of token t: reads the token's gradient once and the slots' rows once, a block at a
    # time, writes the rows' gradients, and keeps a partial product a thread for each slot. They are added when the row is
    # done, always in the same order. Behind the tokens, programs zero the rows that are padding. 2 K + 1 rows of
    # traffic a token.
    program = tl.program_id(0)
    BLOCK: tl.constexpr = LANES * WIDTH
    if program < tokens:
        token = program.to(tl.int64)
        k = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
        slots = token * top_k + k
        row = tl.load(row_id_map + slots, mask=k < top_k, other=-1).to(tl.int64)
        live = (row >= 0) & (row < rows)
        weight = tl.load(topk_weights + slots, mask=live, other=0.0)[:, None, None]
        read = y + (row * y_stride)[:, None, None]
        written = grad_y + (row * hidden)[:, None, None]
        lane = tl.arange(0, LANES)[None, :, None]
        element = tl.arange(0, WIDTH)[None, None, :]
        if NEIGHBOURS:
            tile = lane * WIDTH + element
        else:
            tile = element * LANES + lane
        product = tl.zeros((SLOTS, LANES), tl.float32)
        for start in range(0, hidden, BLOCK):
            columns = start + tile
            inside = columns < hidden
            mask = inside & live[:, None, None]
            g = tl.load(grad + token * grad_stride + columns, mask=inside, other=0.0).to(tl.float32)
            value = tl.load(read + columns, mask=mask, other=0.0).to(tl.float32)
            product += tl.sum(value * g, axis=2)
            tl.store(written + columns, (g * weight).to(grad_y.dtype.element_ty), mask=mask)
        tl.store(grad_weights + slots, tl.where(live, tl.sum(product, axis=1), 0.0), mask=k < top_k)
    elif tl.program_id(1) == 0:
        _zero_padding(
            inv_map, grad_y, program - tokens, rows, tokens.to(tl.int64) * top_k, hidden, 0, hidden, PADDING, BLOCK
        )
