"""The Triton kernels of linear_log_probs."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from grpo_kernels._gemm_triton import pieces, position
from grpo_kernels._math_triton import LN2, LOG2E, LOWEST, clamped
from grpo_kernels.linear_log_probs._tiles_triton import (
    add_lora,
    factors,
    is_live,
    product,
    source,
    transformed,
)

NO_TOKEN = tl.constexpr(2147483647)


@triton.jit
def reduced(
    x,
    start,
    vocab,
    bias,
    target,
    row_in,
    row_low,
    out,
    y_max,
    total,
    weighted,
    squared,
    target_y,
    best,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    ENTROPY: tl.constexpr,
    SQUARED: tl.constexpr,
    TOP1: tl.constexpr,
):
    """The rows' running results, with those of a panel of products from column `start` on. `out` is for base 2."""
    offset = tl.arange(0, x.shape[1])
    y = transformed(x, bias, start + offset, vocab, row_in, row_low, HAS_BIAS, CAPPED)
    y = tl.where((offset < vocab - start)[None, :], y, float("-inf"))  # behind the last column there is no logit 0
    target_y += tl.sum(tl.where(offset[None, :] == (target - start)[:, None], y, 0.0), axis=1)
    largest = tl.maximum(y_max, tl.max(y, axis=1))
    if TOP1:
        here = tl.min(tl.where(y == largest[:, None], offset[None, :], NO_TOKEN), axis=1)
        best = tl.where(largest > y_max, start + here, best)
    shift = clamped((y_max - largest) * out)
    factor = tl.exp2(shift)
    u = (y - largest[:, None]) * out[:, None]
    if ENTROPY:
        u = clamped(u)
    e = tl.exp2(u)
    if ENTROPY:
        weighted = (weighted + shift * total) * factor + tl.sum(e * u, axis=1)
    if SQUARED:
        squared = squared * factor * factor + tl.sum(e * e, axis=1)
    total = total * factor + tl.sum(e, axis=1)
    return largest, total, weighted, squared, target_y, best


@triton.jit(do_not_specialize=["rows", "splits", "tiles_per_split", "group"])
def forward_kernel(
    hidden,
    weight,
    bias,
    projected,
    lora_b,
    token_ids,
    mask,
    temperatures,
    partials,
    partial_ids,
    targets,
    in_factor,
    in_low,
    out_factor,
    rows,
    vocab,
    width,
    rank,
    hidden_stride,
    weight_stride,
    lora_stride,
    splits,
    tiles_per_split,
    group,
    TMA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    CAPPED: tl.constexpr,
    ENTROPY: tl.constexpr,
    SQUARED: tl.constexpr,
    TOP1: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PIECES: tl.constexpr,
):
    # A work item is BLOCK_M rows by one split of the vocabulary; a program takes every num_programs-th one. It walks the
    # split's tiles: a tile of logits is a product over H in float32 accumulators, is reduced where it stands and never
    # leaves the registers. A row's maximum, sums and best id stay in registers over all tiles of the split; 8 to 20 bytes
    # a row and split go out. Read: the hidden states once a split, the weight once a group of row blocks; 2 H operations a
    # logit. The number of splits depends on V alone, so that a row's bits do not depend on the other rows.
    x_source = source(hidden, rows, width, hidden_stride, TMA, BLOCK_M, BLOCK_K)
    w_source = source(weight, vocab, width, weight_stride, TMA, BLOCK_N, BLOCK_K)
    row_blocks = tl.cdiv(rows, BLOCK_M)
    for item in range(tl.program_id(0), row_blocks * splits, tl.num_programs(0)):
        row_block, split = position(item, row_blocks, splits, group)
        row_start = row_block * BLOCK_M
        row = row_start + tl.arange(0, BLOCK_M)
        token_id, live = is_live(token_ids, mask, row, rows, HAS_MASK)
        live = live & (token_id < vocab)
        if tl.max(live.to(tl.int32), axis=0) != 0:
            target = tl.where(live, token_id, -1).to(tl.int32)
            row_in, row_low, out = factors(in_factor, in_low, out_factor, temperatures, row, rows, TEMPERATURE)
            out *= LOG2E
            y_max = tl.full((BLOCK_M,), LOWEST, tl.float32)
            total = tl.zeros((BLOCK_M,), tl.float32)
            weighted = tl.zeros((BLOCK_M,), tl.float32)
            squared = tl.zeros((BLOCK_M,), tl.float32)
            target_y = tl.zeros((BLOCK_M,), tl.float32)
            best = tl.full((BLOCK_M,), NO_TOKEN, tl.int32)
            begin = split * tiles_per_split * BLOCK_N
            end = tl.minimum(begin + tiles_per_split * BLOCK_N, vocab)
            for start in range(begin, end, BLOCK_N):
                x = product(
                    x_source, w_source, row_start, start, rows, vocab, width, hidden_stride, weight_stride,
                    TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip
                if PARTS > 0:
                    x = add_lora(
                        x, projected, lora_b, row_start, start, rows, vocab, rank, lora_stride,
                        PARTS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
                    )  # fmt: skip
                panels = pieces(x, PIECES)
                for piece in tl.static_range(PIECES):
                    y_max, total, weighted, squared, target_y, best = reduced(
                        panels[piece], start + piece * (BLOCK_N // PIECES), vocab, bias, target,
                        row_in, row_low, out, y_max, total, weighted, squared, target_y, best,
                        HAS_BIAS, CAPPED, ENTROPY, SQUARED, TOP1,
                    )  # fmt: skip

            inside = row < rows
            field = tl.cast(rows, tl.int64) * splits
            place = partials + tl.cast(rows, tl.int64) * split + row
            tl.store(place, y_max, mask=inside)
            tl.store(place + field, total, mask=inside)
            if ENTROPY:
                tl.store(place + field * 2, weighted, mask=inside)
            if SQUARED:
                tl.store(place + field * (2 + ENTROPY), squared, mask=inside)
            if TOP1:
                tl.store(partial_ids + tl.cast(rows, tl.int64) * split + row, best, mask=inside)
            tl.store(targets + row, target_y, mask=inside & (target >= begin) & (target < end))


@triton.jit(do_not_specialize=["rows", "splits"])
def merge_kernel(
    partials,
    partial_ids,
    targets,
    token_ids,
    mask,
    temperatures,
    log_probs,
    entropy,
    sum_squared_probs,
    top1_ids,
    statistics,
    out_factor,
    rows,
    vocab,
    splits,
    HAS_MASK: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    ENTROPY: tl.constexpr,
    SQUARED: tl.constexpr,
    TOP1: tl.constexpr,
    STATISTICS: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
):
    # One program owns ROWS rows and holds their partial results of all splits at once, at most 20 bytes a row and split.
    # Reads each once and writes at most 40 bytes a row. Few rows, so that many programs hide each other's loads. Rows
    # that do not count, or whose id is outside, have no partial results: they are not read.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    written = row < rows
    token_id, live = is_live(token_ids, mask, row, rows, HAS_MASK)
    inside = live & (token_id < vocab)
    _, _, out = factors(1.0, 0.0, out_factor, temperatures, row, rows, TEMPERATURE)
    split = tl.arange(0, SPLITS)
    held = (split < splits)[:, None] & inside[None, :]
    offset = split.to(tl.int64)[:, None] * rows + row[None, :]
    field = tl.cast(rows, tl.int64) * splits
    y = tl.load(partials + offset, mask=held, other=LOWEST)
    total = tl.load(partials + field + offset, mask=held, other=0.0)

    row_y = tl.max(y, axis=0)
    shift = clamped((y - row_y[None, :]) * (out * LOG2E)[None, :])
    factor = tl.exp2(shift)
    row_sum = tl.sum(total * factor, axis=0)
    target_y = tl.load(targets + row, mask=inside, other=0.0)
    nothing = row_sum == 0.0  # but -inf
    sound = inside & (row_sum > 0.0) & (row_sum < float("inf"))  # false for NaN, too
    bad = live & (sound == 0)
    nan = float("nan")
    log_sum = tl.log(row_sum)
    log_prob = (target_y - row_y) * out - log_sum
    tl.store(log_probs + row, tl.where(live, tl.where(bad, nan, log_prob), 0.0), mask=written)
    row_weighted = tl.zeros((ROWS,), tl.float32)
    if ENTROPY:
        weighted = tl.load(partials + field * 2 + offset, mask=held, other=0.0)
        row_weighted = tl.sum((weighted + shift * total) * factor, axis=0) * LN2
        value = log_sum - row_weighted / row_sum
        tl.store(entropy + row, tl.where(live, tl.where(bad, nan, value), 0.0), mask=written)
    if SQUARED:
        squared = tl.load(partials + field * (2 + ENTROPY) + offset, mask=held, other=0.0)
        value = tl.sum(squared * factor * factor, axis=0) / row_sum / row_sum
        tl.store(sum_squared_probs + row, tl.where(live, tl.where(bad, nan, value), 0.0), mask=written)
    if STATISTICS:
        # They hold max z rounded, and the sums relative to that. A part of a vocabulary may have nothing but -inf.
        row_max = row_y * out
        lost = tl.fma(row_y, out, -row_max)
        lost = tl.where(nothing, 0.0, lost)
        factor = tl.exp2(lost * LOG2E)
        bad = bad & ((inside == 0) | (nothing == 0))
        row_max = tl.where(nothing, float("-inf"), row_max)
        row_weighted = (row_weighted + lost * row_sum) * factor
        place = statistics + row
        field = tl.cast(rows, tl.int64)
        tl.store(place, tl.where(live, tl.where(bad, nan, row_max), 0.0), mask=written)
        tl.store(place + field, tl.where(live, tl.where(bad, nan, row_sum * factor), 1.0), mask=written)
        tl.store(place + field * 2, tl.where(live, tl.where(bad, nan, target_y * out), 0.0), mask=written)
        tl.store(place + field * 3, tl.where(live, tl.where(bad, nan, row_weighted), 0.0), mask=written)
    if TOP1:
        ids = tl.load(partial_ids + offset, mask=held, other=NO_TOKEN)
        best = tl.min(tl.where(y == row_y[None, :], ids, NO_TOKEN), axis=0)
        tl.store(top1_ids + row, tl.where(sound, best, -1).to(tl.int64), mask=written)


@triton.jit
def gradient(
    x,
    start,
    vocab,
    bias,
    target,
    live,
    row_in,
    row_low,
    out,
    row_max,
    constant,
    linear,
    at_target,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    LOG_PROBS: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """Gradient of a panel of products from column `start` on: (constant + linear u) e^u, and `at_target` at the target."""
    offset = tl.arange(0, x.shape[1])
    y = transformed(x, bias, start + offset, vocab, row_in, row_low, HAS_BIAS, CAPPED)
    u = clamped(tl.fma(y, out[:, None], -row_max[:, None]) * LOG2E)
    factor = constant[:, None]
    if ENTROPY:
        factor = u * (linear * LN2)[:, None] + factor
    grad = tl.exp2(u) * factor
    if LOG_PROBS:
        grad += tl.where(offset[None, :] == (target - start)[:, None], at_target[:, None], 0.0)
    if CAPPED:
        grad *= tl.where(tl.abs(y) < float("inf"), 1.0 - y * y, 1.0)
    return tl.where(live[:, None], grad, 0.0)


@triton.jit(do_not_specialize=["rows", "column_blocks", "first", "group"])
def dlogits_kernel(
    hidden,
    weight,
    bias,
    projected,
    lora_b,
    token_ids,
    active,
    temperatures,
    statistics,
    grad_log_probs,
    grad_entropy,
    grad_log_sum_exp,
    dlogits,
    in_factor,
    in_low,
    out_factor,
    rows,
    vocab,
    width,
    rank,
    hidden_stride,
    weight_stride,
    lora_stride,
    dlogits_stride,
    first,
    column_blocks,
    group,
    TMA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PARTS: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    CAPPED: tl.constexpr,
    LOG_PROBS: tl.constexpr,
    ENTROPY: tl.constexpr,
    LOG_SUM_EXP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PIECES: tl.constexpr,
):
    # A work item is one tile of the gradient of the logits, from column `first` of the vocabulary on. Its program forms the
    # logits again, as the forward does, turns them into gradients in their float32 accumulators and writes each once, in
    # the workspace's dtype: 2 H operations and 2 or 4 bytes an element. Rows without a gradient are zeros; tiles without
    # another row form no logits. The workspace is whole tiles wide: what lies behind the vocabulary is never read.
    PANEL: tl.constexpr = BLOCK_N // PIECES
    x_source = source(hidden, rows, width, hidden_stride, TMA, BLOCK_M, BLOCK_K)
    w_source = source(weight, vocab, width, weight_stride, TMA, BLOCK_N, BLOCK_K)
    row_blocks = tl.cdiv(rows, BLOCK_M)
    for item in range(tl.program_id(0), row_blocks * column_blocks, tl.num_programs(0)):
        row_block, column_block = position(item, row_blocks, column_blocks, group)
        row_start = row_block * BLOCK_M
        row = row_start + tl.arange(0, BLOCK_M)
        inside = row < rows
        live = tl.load(active + row, mask=inside, other=0) != 0
        column = column_block * BLOCK_N + tl.arange(0, PANEL)
        place = dlogits + row.to(tl.int64)[:, None] * dlogits_stride + column[None, :]
        if tl.max(live.to(tl.int32), axis=0) != 0:
            start = first + column_block * BLOCK_N
            x = product(
                x_source, w_source, row_start, start, rows, vocab, width, hidden_stride, weight_stride,
                TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            if PARTS > 0:
                x = add_lora(
                    x, projected, lora_b, row_start, start, rows, vocab, rank, lora_stride,
                    PARTS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
                )  # fmt: skip
            row_in, row_low, out = factors(in_factor, in_low, out_factor, temperatures, row, rows, TEMPERATURE)
            field = tl.cast(rows, tl.int64)
            row_max = tl.load(statistics + row, mask=live, other=0.0)
            inverse = tl.div_rn(1.0, tl.load(statistics + field + row, mask=live, other=1.0))  # NaN: a NaN row
            slope = row_in * out
            constant = tl.zeros((BLOCK_M,), tl.float32)
            linear = tl.zeros((BLOCK_M,), tl.float32)
            at_target = tl.zeros((BLOCK_M,), tl.float32)
            target = tl.full((BLOCK_M,), -1, tl.int32)
            if LOG_PROBS:
                upstream = tl.load(grad_log_probs + row, mask=live, other=0.0)
                constant -= upstream
                at_target = upstream * slope
                token_id = tl.load(token_ids + row, mask=inside, other=-1)
                target = tl.where(token_id < vocab, token_id, -1).to(tl.int32)
            if LOG_SUM_EXP:
                constant += tl.load(grad_log_sum_exp + row, mask=live, other=0.0)
            if ENTROPY:
                upstream = tl.load(grad_entropy + row, mask=live, other=0.0)
                constant += upstream * tl.load(statistics + field * 3 + row, mask=live, other=0.0) * inverse
                linear = -upstream * inverse * slope
            constant *= inverse * slope
            panels = pieces(x, PIECES)
            for piece in tl.static_range(PIECES):
                grad = gradient(
                    panels[piece], start + piece * PANEL, vocab, bias, target, live, row_in, row_low, out, row_max,
                    constant, linear, at_target, HAS_BIAS, CAPPED, LOG_PROBS, ENTROPY,
                )  # fmt: skip
                tl.store(place + piece * PANEL, grad.to(dlogits.dtype.element_ty), mask=inside[:, None])
        else:
            for piece in tl.static_range(PIECES):
                tl.store(
                    place + piece * PANEL,
                    tl.zeros((BLOCK_M, PANEL), dlogits.dtype.element_ty),
                    mask=inside[:, None],
                )
