"""The Triton kernels of token_log_probs, and how they cut a row."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from grpo_kernels._math_triton import LOG2E, LOWEST, tanh
from grpo_kernels._tiles_triton import load_tile, tile

UNDERFLOW = tl.constexpr(-120.0)  # e^u is 0 here; u is clamped, since u * 0 is 0 but -inf * 0 is NaN


class LaunchConfig(NamedTuple):
    """How the kernels cut a row. Depends on V, dtype and alignment, so that a row's bits do not depend on the batch."""

    slots: int  # rows of the tile: independent partial sums
    width: int  # elements of a slot
    neighbours: bool  # whether they lie side by side: one 16-byte load. Else every thread's neighbour has the next one
    num_warps: int
    blocks_per_program: int  # of the backward


def launch_config(vocab: int, element_size: int, aligned: bool) -> LaunchConfig:
    """Tiles of 8 KiB, 16 bytes a thread; one block is prefetched while another is reduced.

    Rows of a vocabulary that is no multiple of 16, or that are not `aligned` to 16 bytes, allow no wide loads. There a
    warp loads 32 elements in a row, an element a thread.
    """
    width = 16 // element_size
    slots = min(512, max(32, triton.next_power_of_2(triton.cdiv(vocab, width))))
    return LaunchConfig(slots, width, aligned and vocab % 16 == 0, slots // 32, 4)


@triton.jit
def _row_start(row, inner, outer_stride, inner_stride):
    """Element offset of a row, 64 bits."""
    return (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride


@triton.jit
def _is_live(token_id, mask, row, HAS_MASK: tl.constexpr):
    live = token_id >= 0
    if HAS_MASK:
        live = live & (tl.load(mask + row) != 0)
    return live


@triton.jit
def _factors(in_factor, in_low, out_factor, temperatures, row, TEMPERATURE: tl.constexpr):
    """z = out * y, y = x * in or tanh(x * in), out > 0. TEMPERATURE: 0 is in out_factor, 1 one value, 2 one a row."""
    if TEMPERATURE == 1:
        out_factor = tl.div_rn(out_factor, tl.load(temperatures))
    if TEMPERATURE == 2:
        out_factor = tl.div_rn(out_factor, tl.load(temperatures + row))
    sign = tl.where(out_factor < 0.0, -1.0, 1.0)
    return in_factor * sign, in_low * sign, out_factor * sign


@triton.jit
def _transform(x, in_factor, in_low, CAPPED: tl.constexpr):
    x = x.to(tl.float32)
    y = x * in_factor
    if CAPPED:  # infinities and NaN keep their meaning; in_low is what in_factor lost when it was rounded
        y = tl.where(tl.abs(x) < float("inf"), tanh(x * in_low + y), y)
    return y


@triton.jit(do_not_specialize=["rows", "inner"])
def forward_kernel(
    logits,
    token_ids,
    mask,
    temperatures,
    log_probs,
    entropy,
    sum_squared_probs,
    top1_ids,
    statistics,
    in_factor,
    in_low,
    out_factor,
    rows,
    vocab,
    inner,
    outer_stride,
    inner_stride,
    HAS_MASK: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    CAPPED: tl.constexpr,
    ENTROPY: tl.constexpr,
    SQUARED: tl.constexpr,
    TOP1: tl.constexpr,
    STATISTICS: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
):
    # One program owns one row and reads it once: V elements in, at most 40 bytes out. A tile is SLOTS x WIDTH, whole slots
    # a thread; every slot keeps a maximum and sums of its own in registers, so that the loop has no barrier and
    # no shuffle, and one exponential an element plus one a slot. Slots merge after the loop. The next tile loads while this
    # one is reduced.
    row = tl.program_id(0)
    token_id = tl.load(token_ids + row)
    live = _is_live(token_id, mask, row, HAS_MASK)
    inside = live & (token_id < vocab)
    count = tl.where(inside, vocab, 0)
    in_factor, in_low, out = _factors(in_factor, in_low, out_factor, temperatures, row, TEMPERATURE)
    padding = tl.where(in_factor < 0.0, float("inf"), float("-inf"))  # probability zero after the transform
    row_pointer = logits + _row_start(row, inner, outer_stride, inner_stride)

    BLOCK: tl.constexpr = SLOTS * WIDTH
    y_max = tl.full((SLOTS,), LOWEST, tl.float32)
    total = tl.zeros((SLOTS,), tl.float32)
    weighted = tl.zeros((SLOTS,), tl.float32)
    squared = tl.zeros((SLOTS,), tl.float32)
    first = tl.zeros((SLOTS,), tl.int32)

    following = load_tile(row_pointer, 0, count, padding, SLOTS, WIDTH, NEIGHBOURS)
    for start in range(0, count, BLOCK):
        x = following
        following = load_tile(row_pointer, start + BLOCK, count, padding, SLOTS, WIDTH, NEIGHBOURS)
        y = _transform(x, in_factor, in_low, CAPPED)
        largest = tl.maximum(y_max, tl.max(y, axis=1))
        if TOP1:
            first = tl.where(largest > y_max, start, first)
        shift = tl.maximum((y_max - largest) * out, UNDERFLOW, propagate_nan=tl.PropagateNan.ALL)
        y_max = largest
        factor = tl.exp2(shift * LOG2E)
        u = (y - y_max[:, None]) * out
        if ENTROPY:
            u = tl.maximum(u, UNDERFLOW, propagate_nan=tl.PropagateNan.ALL)
        e = tl.exp2(u * LOG2E)
        if ENTROPY:
            weighted = (weighted + shift * total) * factor + tl.sum(e * u, axis=1)
        if SQUARED:
            squared = squared * factor * factor + tl.sum(e * e, axis=1)
        total = total * factor + tl.sum(e, axis=1)

    row_y = tl.max(y_max, axis=0)
    shift = tl.maximum((y_max - row_y) * out, UNDERFLOW, propagate_nan=tl.PropagateNan.ALL)
    factor = tl.exp2(shift * LOG2E)
    row_sum = tl.sum(total * factor, axis=0)
    row_weighted = tl.sum((weighted + shift * total) * factor, axis=0)
    row_squared = tl.sum(squared * factor * factor, axis=0)

    target_y = _transform(
        tl.load(row_pointer + tl.where(inside, token_id, 0), mask=inside, other=0.0), in_factor, in_low, CAPPED
    )
    u_target = (target_y - row_y) * out
    sound = (row_sum > 0.0) & (row_sum < float("inf"))  # false for NaN, and for a row of nothing but -inf
    bad = live & (inside == 0) | live & (sound == 0)
    nan = float("nan")
    log_sum = tl.log(row_sum)
    tl.store(log_probs + row, tl.where(live, tl.where(bad, nan, u_target - log_sum), 0.0))
    if ENTROPY:
        tl.store(entropy + row, tl.where(live, tl.where(bad, nan, log_sum - row_weighted / row_sum), 0.0))
    if SQUARED:
        squares = row_squared / row_sum / row_sum
        tl.store(sum_squared_probs + row, tl.where(live, tl.where(bad, nan, squares), 0.0))
    if STATISTICS:
        # They hold max z rounded, and the sums relative to that. A row of nothing but -inf may be part of a longer one.
        row_max = row_y * out
        lost = tl.fma(row_y, out, -row_max)
        factor = tl.exp2(lost * LOG2E)
        row_weighted = (row_weighted + lost * row_sum) * factor
        place = statistics + row
        zero = tl.where(inside & (row_sum == 0.0), 0.0, nan)
        lowest = zero - float("inf")
        tl.store(place, tl.where(live, tl.where(bad, lowest, row_max), 0.0))
        tl.store(place + tl.cast(rows, tl.int64), tl.where(live, tl.where(bad, zero, row_sum * factor), 1.0))
        tl.store(place + tl.cast(rows, tl.int64) * 2, tl.where(live, tl.where(bad, lowest, target_y * out), 0.0))
        tl.store(place + tl.cast(rows, tl.int64) * 3, tl.where(live, tl.where(bad, zero, row_weighted), 0.0))
    if TOP1:
        # The slots that hold the maximum remember the block where they met it; the earliest one holds the lowest id.
        known = live & (bad == 0)
        begin = tl.min(tl.where((y_max == row_y) & known, first, 2147483647), axis=0)
        begin = tl.where(known, begin, 0)
        x = load_tile(row_pointer, begin, tl.where(known, vocab, 0), padding, SLOTS, WIDTH, NEIGHBOURS)
        columns = tile(begin, SLOTS, WIDTH, NEIGHBOURS)
        best = tl.min(tl.where(_transform(x, in_factor, in_low, CAPPED) == row_y, columns, 2147483647))
        tl.store(top1_ids + row, tl.where(known, best, -1).to(tl.int64))


@triton.jit(do_not_specialize=["rows", "inner"])
def backward_kernel(
    logits,
    token_ids,
    mask,
    temperatures,
    statistics,
    grad_log_probs,
    grad_entropy,
    grad_log_sum_exp,
    grad_logits,
    in_factor,
    in_low,
    out_factor,
    rows,
    vocab,
    inner,
    outer_stride,
    inner_stride,
    grad_outer_stride,
    grad_inner_stride,
    HAS_MASK: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    CAPPED: tl.constexpr,
    ENTROPY: tl.constexpr,
    LOG_SUM_EXP: tl.constexpr,
    BLOCKS: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
):
    # Program (r, c) owns chunk c, BLOCKS tiles, of row r: reads each element once and writes its gradient once, over it if
    # grad_logits is logits. Few registers, so many programs a multiprocessor: they hide each other's loads. Rows that are
    # masked, or whose upstream gradients are zero, are written and not read.
    row = tl.program_id(0)
    token_id = tl.load(token_ids + row)
    upstream = tl.load(grad_log_probs + row)
    upstream_entropy = 0.0
    if ENTROPY:
        upstream_entropy = tl.load(grad_entropy + row)
    wanted = (upstream != 0.0) | (upstream_entropy != 0.0)
    falling = upstream  # what p is multiplied by
    if LOG_SUM_EXP:
        upstream_log_sum_exp = tl.load(grad_log_sum_exp + row)
        wanted = wanted | (upstream_log_sum_exp != 0.0)
        falling = upstream - upstream_log_sum_exp
    live = _is_live(token_id, mask, row, HAS_MASK) & wanted
    in_factor, in_low, out = _factors(in_factor, in_low, out_factor, temperatures, row, TEMPERATURE)
    padding = tl.where(in_factor < 0.0, float("inf"), float("-inf"))  # probability zero after the transform
    place = statistics + row
    row_max = tl.load(place)
    row_sum = tl.load(place + tl.cast(rows, tl.int64))
    inverse = tl.div_rn(1.0, row_sum)  # NaN in the statistics makes the whole row NaN
    slope = in_factor * out
    constant = -falling * inverse * slope
    linear = 0.0
    if ENTROPY:
        mean_u = tl.load(place + tl.cast(rows, tl.int64) * 3) * inverse
        constant = (upstream_entropy * mean_u - falling) * inverse * slope
        linear = -upstream_entropy * inverse * slope
    at_target = upstream * slope
    target = tl.where(token_id < vocab, token_id, -1).to(tl.int32)

    row_pointer = logits + _row_start(row, inner, outer_stride, inner_stride)
    grad_pointer = grad_logits + _row_start(row, inner, grad_outer_stride, grad_inner_stride)
    BLOCK: tl.constexpr = SLOTS * WIDTH
    columns = tile(0, SLOTS, WIDTH, NEIGHBOURS)
    begin = tl.program_id(1) * (BLOCKS * BLOCK)
    end = tl.minimum(begin + BLOCKS * BLOCK, vocab)
    readable_end = tl.where(live, end, 0)

    for start in range(begin, end, BLOCK):
        x = load_tile(row_pointer, start, readable_end, padding, SLOTS, WIDTH, NEIGHBOURS)
        y = _transform(x, in_factor, in_low, CAPPED)
        u = tl.fma(y, out, -row_max)
        u = tl.maximum(u, UNDERFLOW, propagate_nan=tl.PropagateNan.ALL)
        factor = constant
        if ENTROPY:
            factor = u * linear + constant
        grad = tl.exp2(u * LOG2E) * factor + tl.where(columns == target - start, at_target, 0.0)
        if CAPPED:
            grad = grad * tl.where(tl.abs(y) < float("inf"), 1.0 - y * y, 1.0)
        grad = tl.where(live, grad, 0.0).to(grad_logits.dtype.element_ty)
        pointers = tile(grad_pointer + start, SLOTS, WIDTH, NEIGHBOURS)
        if start + BLOCK <= end:
            tl.store(pointers, grad)
        else:
            tl.store(pointers, grad, mask=columns < end - start)
