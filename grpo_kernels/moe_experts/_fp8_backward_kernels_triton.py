"""The Triton kernels of the experts' activation that quantise: its gradients."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from grpo_kernels._fp8_triton import decode, write_tiles
from grpo_kernels.moe_experts._fp8_kernels_triton import TILE, load_wide, parted
from grpo_kernels.moe_experts._kernels_triton import glu_gradients, slots_of

COLUMNS = 32  # activations of a program that writes transposes
COLUMN_WARPS = 8
_NEIGHBOURS = tl.constexpr(4)  # activations of a thread there: few, so that few maxima pass from thread to thread


@triton.jit
def _interleaved(gate, up):
    """The converse of `parted`."""
    ROWS: tl.constexpr = gate.shape[0]
    return tl.reshape(tl.join(gate, up), (ROWS, 2 * gate.shape[1]))


@triton.jit
def _load_codes(codes, row, column, limit, live, stride, ENCODE: tl.constexpr):
    """Numbers of the codes in columns below a limit, without their scales; 0 elsewhere, and in rows that are not live."""
    wanted = live & (column < limit)[None, :]
    return decode(tl.load(codes + row.to(tl.int64) * stride + column[None, :], mask=wanted, other=0), ENCODE)


@triton.jit
def _load_scale(scales, row, tile, tiles, live, stride):
    """[ROWS, 1] of a tile; 0 where there is none."""
    return tl.load(scales + tile.to(tl.int64) * stride + row, mask=live & (tile < tiles), other=0.0)


@triton.jit
def _load_scales(scales, row, column, own, other, tiles, live, stride):
    """Of every column, which are of the tile `own`, of `other`, or of the one behind that."""
    nearest = _load_scale(scales, row, own, tiles, live, stride)
    first = _load_scale(scales, row, other, tiles, live, stride)
    second = _load_scale(scales, row, other + 1, tiles, live, stride)
    tile = (column // TILE)[None, :]
    return tl.where(tile == own, nearest, tl.where(tile == other, first, second))


@triton.jit
def _load_preact(
    codes, scales, row, start, width, live, stride, scale_stride,
    INTERLEAVED: tl.constexpr, WHOLE: tl.constexpr, ENCODE: tl.constexpr, COLUMNS: tl.constexpr, NEIGHBOURS: tl.constexpr,
):  # fmt: skip
    """Gates and ups of COLUMNS activations from `start` on. Their gates lie in one tile, and if WHOLE their ups.

    A thread gets NEIGHBOURS of them at most that follow each other."""
    tiles = tl.cdiv(2 * width, TILE)
    if INTERLEAVED:
        column = tl.max_contiguous(2 * start + tl.arange(0, 2 * COLUMNS), 2 * NEIGHBOURS)
        both = _load_codes(codes, row, column, 2 * width, live, stride, ENCODE)
        both *= _load_scale(scales, row, 2 * start // TILE, tiles, live, scale_stride)
        gate, up = parted(both)
    else:
        column = tl.max_contiguous(start + tl.arange(0, COLUMNS), NEIGHBOURS)
        gate = _load_codes(codes, row, column, width, live, stride, ENCODE)
        gate *= _load_scale(scales, row, start // TILE, tiles, live, scale_stride)
        column = tl.max_contiguous(column + width, NEIGHBOURS)
        tile = (start + width) // TILE
        up = _load_codes(codes, row, column, 2 * width, live, stride, ENCODE)
        if WHOLE:
            up *= _load_scale(scales, row, tile, tiles, live, scale_stride)
        else:
            up *= _load_scales(scales, row, column, tile, tile, tiles, live, scale_stride)
    return gate, up


@triton.jit
def _store_wide(value, out, start, column, limit, inside):
    """The converse of `load_wide`, rounded."""
    place = out + start + column[None, :]
    tl.store(place, value.to(out.dtype.element_ty), mask=inside & (column < limit)[None, :])


@triton.jit
def _write_cut_tiles(
    codes, scales, grad_activated, weight, data, scale, row, line, live, alpha, limit, eps, rows, width,
    codes_stride, scales_stride, data_stride, scale_stride, CLAMPED: tl.constexpr, ENCODE: tl.constexpr,
):  # fmt: skip
    """The gradient of the pre-activations, quantised, where one tile has gates and ups of different activations.

    Each of its columns is computed anew, with the other of its pair."""
    tiles = tl.cdiv(2 * width, TILE)
    for begin in range(0, 2 * width, TILE):
        start = tl.full((), begin, tl.int32)
        column = start + tl.arange(0, TILE)
        tile = start // TILE
        of_ups = column >= width
        place = tl.where(of_ups, column - width, column)
        gate = _load_codes(codes, row, place, width, live, codes_stride, ENCODE)
        other = tl.maximum(start - width, 0) // TILE
        gate *= _load_scales(scales, row, place, tile, other, tiles, live, scales_stride)
        up = _load_codes(codes, row, place + width, 2 * width, live, codes_stride, ENCODE)
        other = (start + width) // TILE
        up *= _load_scales(scales, row, place + width, tile, other, tiles, live, scales_stride)
        grad = load_wide(grad_activated, row.to(tl.int64) * width, place, width, live)
        _, of_gate, of_up = glu_gradients(gate, up, grad, alpha, limit, CLAMPED)
        value = tl.where(of_ups[None, :], of_up, of_gate) * weight
        value = tl.where((column < 2 * width)[None, :], value, 0.0)  # beside the last tile's, scales are of other tiles
        write_tiles(
            value, data, scale, line, column, rows, 2 * width, data_stride, scale_stride, tile, eps, 1, True, ENCODE
        )


@triton.jit(do_not_specialize=["rows", "slots", "scales_stride", "scale_stride"])
def glu_backward_rows_kernel(
    codes,
    scales,
    grad_activated,
    inv_map,
    weights,
    row_terms,
    data,
    scale,
    wide,
    activated,
    grad_weights,
    alpha,
    limit,
    eps,
    rows,
    slots,
    width,
    codes_stride,
    scales_stride,
    data_stride,
    scale_stride,
    CLAMPED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WHOLE: tl.constexpr,
    HAS_TERMS: tl.constexpr,
    TILES: tl.constexpr,
    WIDE: tl.constexpr,
    ACTIVATED: tl.constexpr,
    WEIGHTS: tl.constexpr,
    ENCODE: tl.constexpr,
    ROWS: tl.constexpr,
):
    # A program owns ROWS rows and walks their columns, a tile of gates and one of ups, or one of both, at a time. Of a bf16
    # gradient, for each activation: 4.06 bytes are read, and written 2.06 (TILES), 4 (WIDE) and 2 (ACTIVATED): 12.1 for all.
    # Products with the gradient add up in registers, a sum for each place in the block, and once across them at the end.
    # Where the width cuts a tile in two (not WHOLE) a second walk over the same memory writes TILES. Rows of padding, and
    # rows of no slot, are written and not read.
    BLOCK: tl.constexpr = TILE // 2 if INTERLEAVED else TILE
    row, inside, slot = slots_of(inv_map, tl.program_id(0), rows, ROWS)
    line = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = (slot >= 0) & (slot < slots)
    weight = tl.load(weights + slot, mask=live, other=0.0)
    place = row.to(tl.int64) * width
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for begin in range(0, width, BLOCK):
        start = tl.full((), begin, tl.int32)  # a number in the interpreter
        gate, up = _load_preact(
            codes,
            scales,
            row,
            start,
            width,
            live,
            codes_stride,
            scales_stride,
            INTERLEAVED,
            WHOLE,
            ENCODE,
            BLOCK,
            BLOCK,
        )
        column = start + tl.arange(0, BLOCK)
        grad = gate
        if TILES or WIDE or WEIGHTS:
            grad = load_wide(grad_activated, place, column, width, live)
        value, of_gate, of_up = glu_gradients(gate, up, grad, alpha, limit, CLAMPED)
        of_gate, of_up = of_gate * weight, of_up * weight
        if WEIGHTS:
            total += grad * value
        if ACTIVATED:
            _store_wide(value * weight, activated, place, column, width, inside)
        if INTERLEAVED:
            both = _interleaved(of_gate, of_up)
            column = 2 * start + tl.arange(0, TILE)
            if WIDE:
                _store_wide(both, wide, 2 * place, column, 2 * width, inside)
            if TILES:
                write_tiles(
                    both, data, scale, line, column, rows, 2 * width, data_stride, scale_stride, start // BLOCK, eps,
                    1, True, ENCODE,
                )  # fmt: skip
        else:
            if WIDE:
                _store_wide(of_gate, wide, 2 * place, column, width, inside)
                _store_wide(of_up, wide, 2 * place, column + width, 2 * width, inside)
            if TILES and WHOLE:
                write_tiles(
                    of_gate, data, scale, line, column, rows, width, data_stride, scale_stride, start // TILE, eps,
                    1, True, ENCODE,
                )  # fmt: skip
                write_tiles(
                    of_up, data, scale, line, column + width, rows, 2 * width, data_stride, scale_stride,
                    (start + width) // TILE, eps, 1, True, ENCODE,
                )  # fmt: skip
    if TILES and not WHOLE:
        _write_cut_tiles(
            codes, scales, grad_activated, weight, data, scale, row, line, live, alpha, limit, eps, rows, width,
            codes_stride, scales_stride, data_stride, scale_stride, CLAMPED, ENCODE,
        )  # fmt: skip
    if WEIGHTS:
        result = tl.sum(total, axis=1)[:, None]
        if HAS_TERMS:
            result += tl.load(row_terms + row, mask=live, other=0.0)
        tl.store(grad_weights + slot, result, mask=live)


@triton.jit(do_not_specialize=["slots", "scales_stride", "scale_t_stride", "activated_scale_t_stride"])
def glu_backward_columns_kernel(
    codes,
    scales,
    grad_activated,
    inv_map,
    weights,
    data_t,
    scale_t,
    activated_data_t,
    activated_scale_t,
    alpha,
    limit,
    eps,
    grad_eps,
    rows,
    slots,
    width,
    codes_stride,
    scales_stride,
    data_t_stride,
    scale_t_stride,
    activated_data_t_stride,
    activated_scale_t_stride,
    CLAMPED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WHOLE: tl.constexpr,
    GRADIENT: tl.constexpr,
    ACTIVATED: tl.constexpr,
    ENCODE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # A program owns COLUMNS activations of 128 rows, a tile: reads their pre-activations and gradients, computes what the
    # rows' kernel computes, and writes it turned through shared memory. Of a bf16 gradient, for each activation: 4.06 bytes
    # in, 2.06 (GRADIENT) and 1.03 (ACTIVATED) out: 7.2 for both.
    across = tl.cdiv(width, COLUMNS)
    block, start = tl.program_id(0) // across, tl.program_id(0) % across * COLUMNS
    row, _, slot = slots_of(inv_map, block, rows, TILE)
    place = block * TILE + tl.arange(0, TILE)
    live = (slot >= 0) & (slot < slots)
    weight = tl.load(weights + slot, mask=live, other=0.0)
    gate, up = _load_preact(
        codes,
        scales,
        row,
        start,
        width,
        live,
        codes_stride,
        scales_stride,
        INTERLEAVED,
        WHOLE,
        ENCODE,
        COLUMNS,
        _NEIGHBOURS,
    )
    column = tl.max_contiguous(start + tl.arange(0, COLUMNS), _NEIGHBOURS)
    grad = gate
    if GRADIENT:
        grad = load_wide(grad_activated, row.to(tl.int64) * width, column, width, live)
    value, of_gate, of_up = glu_gradients(gate, up, grad, alpha, limit, CLAMPED)
    of_gate, of_up = of_gate * weight, of_up * weight
    if GRADIENT and INTERLEAVED:
        both = 2 * start + tl.arange(0, 2 * COLUMNS)
        write_tiles(
            _interleaved(of_gate, of_up), data_t, scale_t, both, place, 2 * width, rows, data_t_stride,
            scale_t_stride, block, grad_eps, 0, True, ENCODE,
        )  # fmt: skip
    elif GRADIENT:
        write_tiles(
            of_gate, data_t, scale_t, column, place, width, rows, data_t_stride, scale_t_stride, block, grad_eps,
            0, True, ENCODE,
        )  # fmt: skip
        write_tiles(
            of_up, data_t, scale_t, column + width, place, 2 * width, rows, data_t_stride, scale_t_stride, block,
            grad_eps, 0, True, ENCODE,
        )  # fmt: skip
    if ACTIVATED:
        write_tiles(
            value * weight, activated_data_t, activated_scale_t, column, place, width, rows, activated_data_t_stride,
            activated_scale_t_stride, block, eps, 0, True, ENCODE,
        )  # fmt: skip
