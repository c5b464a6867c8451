"""The Triton kernel of the experts' activation that quantises.

Interleaved gates and ups are loaded and stored as they lie, in tiles of 64 pairs, and parted in registers: neighbours in
memory belong to one thread.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from grpo_kernels._fp8_triton import encode, magnitude, scaled, tile_scale, write_tiles
from grpo_kernels.moe_experts._kernels_triton import glu, slots_of

TILE = tl.constexpr(128)


@triton.jit
def parted(both):
    """Gates and ups of interleaved columns."""
    ROWS: tl.constexpr = both.shape[0]
    return tl.split(tl.reshape(both, (ROWS, both.shape[1] // 2, 2)))


@triton.jit
def load_wide(memory, start, column, limit, live):
    """Float32 values of columns below a limit; 0 elsewhere, and in rows that are not live. start: of the rows, [ROWS, 1]."""
    wanted = live & (column < limit)[None, :]
    return tl.load(memory + start + column[None, :], mask=wanted, other=0.0).to(tl.float32)


@triton.jit
def _write_halves(
    lower, upper, data, scale, row, column, rows, width, data_stride, scale_stride, tile, eps, ENCODE: tl.constexpr
):
    """write_tiles along rows, for a tile that comes as its lower and its upper 64 columns; column: of the lower."""
    largest = tl.maximum(tl.max(magnitude(lower), axis=1), tl.max(magnitude(upper), axis=1))
    found, factor = tile_scale(largest, eps, True)
    exists = (row < rows)[:, None]
    place = data + row.to(tl.int64)[:, None] * data_stride
    code = encode(scaled(lower, factor[:, None], True), ENCODE)
    tl.store(place + column[None, :], code, mask=exists & (column < width)[None, :])
    column += TILE // 2
    code = encode(scaled(upper, factor[:, None], True), ENCODE)
    tl.store(place + column[None, :], code, mask=exists & (column < width)[None, :])
    tl.store(scale + tile.to(tl.int64) * scale_stride + row, found, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "scale_stride", "preact_scale_stride"])
def glu_quantize_kernel(
    preact,
    inv_map,
    data,
    scale,
    preact_data,
    preact_scale,
    alpha,
    limit,
    eps,
    rows,
    width,
    data_stride,
    scale_stride,
    preact_data_stride,
    preact_scale_stride,
    CLAMPED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    KEEP: tl.constexpr,
    WHOLE: tl.constexpr,
    ENCODE: tl.constexpr,
    ROWS: tl.constexpr,
):
    # A program owns one tile of ROWS rows of the activation: reads its pre-activations once, and writes the codes and a
    # scale a row, and of what is kept likewise. Of bf16, for each activation: 5.03 bytes, 7.09 where the pre-activations
    # are kept. Where the width cuts a tile of theirs in two (not WHOLE), programs of their own quantise them: 11.1, of
    # which 4 were read just before. Rows of padding are written and not read.
    across = tl.cdiv(width, TILE)
    programs = across
    if KEEP and not WHOLE:
        programs += tl.cdiv(2 * width, TILE)
    block, tile = tl.program_id(0) // programs, tl.program_id(0) % programs
    row, _, slot = slots_of(inv_map, block, rows, ROWS)
    live = slot >= 0
    start = row.to(tl.int64) * 2 * width
    line = block * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, TILE)
    if INTERLEAVED:
        column = 2 * tile * TILE + lane
        first = load_wide(preact, start, column, 2 * width, live)
        second = load_wide(preact, start, column + TILE, 2 * width, live)
        gate, up = parted(first)
        lower = glu(gate, up, alpha, limit, CLAMPED)
        gate, up = parted(second)
        upper = glu(gate, up, alpha, limit, CLAMPED)
        place = tile * TILE + tl.arange(0, TILE // 2)
        _write_halves(lower, upper, data, scale, line, place, rows, width, data_stride, scale_stride, tile, eps, ENCODE)
        if KEEP:
            write_tiles(
                first, preact_data, preact_scale, line, column, rows, 2 * width, preact_data_stride,
                preact_scale_stride, 2 * tile, eps, 1, True, ENCODE,
            )  # fmt: skip
            lines = tl.where((2 * tile + 1) * TILE < 2 * width, rows, 0)  # the tile may not be there
            write_tiles(
                second, preact_data, preact_scale, line, column + TILE, lines, 2 * width, preact_data_stride,
                preact_scale_stride, 2 * tile + 1, eps, 1, True, ENCODE,
            )  # fmt: skip
    elif tile < across:
        column = tile * TILE + lane
        gate = load_wide(preact, start, column, width, live)
        up = load_wide(preact, start, column + width, 2 * width, live)
        value = glu(gate, up, alpha, limit, CLAMPED)
        write_tiles(
            value, data, scale, line, column, rows, width, data_stride, scale_stride, tile, eps, 1, True, ENCODE
        )
        if KEEP and WHOLE:
            write_tiles(
                gate, preact_data, preact_scale, line, column, rows, width, preact_data_stride, preact_scale_stride,
                tile, eps, 1, True, ENCODE,
            )  # fmt: skip
            write_tiles(
                up, preact_data, preact_scale, line, column + width, rows, 2 * width, preact_data_stride,
                preact_scale_stride, across + tile, eps, 1, True, ENCODE,
            )  # fmt: skip
    elif KEEP and not WHOLE:
        tile -= across
        column = tile * TILE + lane
        value = load_wide(preact, start, column, 2 * width, live)
        write_tiles(
            value, preact_data, preact_scale, line, column, rows, 2 * width, preact_data_stride, preact_scale_stride,
            tile, eps, 1, True, ENCODE,
        )  # fmt: skip
