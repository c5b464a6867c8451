"""The Triton kernels that draw the last token of verify_draft: the race of the tokens, and its end."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from grpo_kernels._math_triton import LOG2E
from grpo_kernels._tiles_triton import tile
from grpo_kernels.speculative_sampling._tiles_triton import (
    EXCLUDED,
    FAULT,
    NO_TOKEN,
    PLAIN,
    RECORD,
    RESIDUAL,
    below_one,
    exponentials,
    load_logits,
    random_words,
    scale_of,
)

MARGIN = tl.constexpr(1.0 - 2.0**-20)


@triton.jit
def weights(x, top, scale, log2_weight, threshold, FILTERED: tl.constexpr):
    """A tile's e^z, times a weight. Without a product at the end, which a compiler might fuse with the difference to
    come: equal rows must leave exactly nothing."""
    found = tl.exp2(tl.fma((x - top) * scale, LOG2E, log2_weight))
    if FILTERED:
        found = tl.where(x >= threshold, found, 0.0)
    return found


@triton.jit
def fastest(
    target, draft, record, kind, excluded, seed, place, begin, end, scale, HAS_DRAFT: tl.constexpr,
    FILTERED: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The best score of columns [begin, end), and the lowest id that has it; 0 where no token has a weight.

    -log(1 - y) is not less than y: weights that are not above best * y cannot win. Most tiles have no others, and need
    neither logarithms nor divisions. With a margin for rounding, so that the result does not depend on the parts.
    """
    top, log2_weight, threshold = tl.load(record), tl.load(record + 1), tl.load(record + 2)
    if HAS_DRAFT:
        draft_top, draft_weight, draft_threshold = tl.load(record + 3), tl.load(record + 4), tl.load(record + 5)
    best = 0.0
    winner = NO_TOKEN + 0
    for start in range(begin, end, SLOTS * WIDTH):
        x = load_logits(target, start, end, SLOTS, WIDTH, True)
        weight = weights(x, top, scale, log2_weight, threshold, FILTERED)
        if HAS_DRAFT:
            # Where there is no residual nothing is read: -inf, weight 0.
            y = load_logits(draft, start, tl.where(kind == RESIDUAL, end, start), SLOTS, WIDTH, True)
            weight -= weights(y, draft_top, scale, draft_weight, draft_threshold, FILTERED)
        else:
            weight = tl.where(tile(start, SLOTS, WIDTH, True) == excluded, 0.0, weight)
        words = random_words(seed, place, start, SLOTS, WIDTH)
        if tl.max(tl.fma(below_one(words), best * -MARGIN, weight)) > 0.0:
            score = weight / exponentials(words)
            highest = tl.max(score)
            if highest > best:
                best = highest
                winner = tl.min(tl.where(score == highest, tile(start, SLOTS, WIDTH, True), NO_TOKEN))
    return best, winner


@triton.jit
def drawn_at(draft_ids, num_accepted, seeds, offsets, row, drafts, kind, HAS_OFFSETS: tl.constexpr):
    """At which position of a sequence a token is drawn, the noise it is drawn with, and the draft that it cannot be."""
    position = tl.load(num_accepted + row)
    seed = tl.load(seeds + row)
    place = position
    if HAS_OFFSETS:
        place += tl.load(offsets + row)
    excluded = tl.load(draft_ids + row * drafts + position, mask=kind == EXCLUDED, other=-1).to(tl.int32)
    return position, seed, place, excluded


@triton.jit(do_not_specialize=["drafts", "splits"])
def race_kernel(
    target,
    draft,
    draft_ids,
    temperatures,
    seeds,
    offsets,
    records,
    kinds,
    num_accepted,
    scores,
    ids,
    vocab,
    drafts,
    splits,
    columns,
    target_batch_stride,
    target_stride,
    draft_batch_stride,
    draft_stride,
    HAS_DRAFT: tl.constexpr,
    HAS_TEMPERATURES: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    FILTERED: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    # Program (b, c), one warp, owns part c of the one position of sequence b where a token is drawn. Reads each logit of
    # the target once and, for a residual, of the draft; writes the best score and its token, 8 bytes. A thread draws the
    # noise of its own tokens, one Philox block for each four. Logarithms are formed only in tiles where a token may win.
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    kind = tl.load(kinds + row)
    if kind != FAULT:
        position, seed, place, excluded = drawn_at(
            draft_ids, num_accepted, seeds, offsets, row, drafts, kind, HAS_OFFSETS
        )
        scale, _ = scale_of(temperatures, row, HAS_TEMPERATURES)
        target_row = target + row * target_batch_stride + position * target_stride
        draft_row = draft
        if HAS_DRAFT:
            draft_row = draft + row * draft_batch_stride + position * draft_stride
        begin = split * columns
        score, token = fastest(
            target_row, draft_row, records + row * RECORD, kind, excluded, seed, place, begin,
            tl.minimum(begin + columns, vocab), scale, HAS_DRAFT, FILTERED, SLOTS, WIDTH,
        )  # fmt: skip
        tl.store(scores + row * splits + split, score)
        tl.store(ids + row * splits + split, token)


@triton.jit(do_not_specialize=["drafts", "splits"])
def choose_kernel(
    target,
    draft_ids,
    temperatures,
    seeds,
    offsets,
    records,
    kinds,
    num_accepted,
    scores,
    ids,
    token_ids,
    log_probs,
    vocab,
    drafts,
    splits,
    target_batch_stride,
    target_stride,
    HAS_TEMPERATURES: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    FILTERED: tl.constexpr,
    SPLITS: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    # One program owns a sequence: reads 8 bytes a part and one logit, writes one token and its log-prob. Where rounding
    # left no weight anywhere, it runs the race over p by itself: there p and q agree but for their last places.
    row = tl.program_id(0).to(tl.int64)
    kind = tl.load(kinds + row)
    if kind != FAULT:
        position, seed, place, _ = drawn_at(draft_ids, num_accepted, seeds, offsets, row, drafts, kind, HAS_OFFSETS)
        scale, _ = scale_of(temperatures, row, HAS_TEMPERATURES)
        target_row = target + row * target_batch_stride + position * target_stride
        split = tl.arange(0, SPLITS)
        score = tl.load(scores + row * splits + split, mask=split < splits, other=0.0)
        token = tl.load(ids + row * splits + split, mask=split < splits, other=NO_TOKEN)
        best = tl.max(score, axis=0)
        winner = tl.min(tl.where(score == best, token, NO_TOKEN), axis=0)
        record = records + row * RECORD
        if best == 0.0:
            best, winner = fastest(
                target_row, target_row, record, PLAIN, -1, seed, place, 0, vocab, scale, False, FILTERED, SLOTS, WIDTH
            )  # fmt: skip
        winner = tl.minimum(winner, vocab - 1)  # whatever the logits are
        x = tl.load(target_row + winner).to(tl.float32)
        log_total = tl.load(record + 6)
        out = row * (drafts + 1) + position
        tl.store(token_ids + out, winner.to(tl.int64))
        tl.store(log_probs + out, tl.fma(x - tl.load(record), scale, -log_total))
