"""The Triton kernels of verify_draft: statistics, the token and greedy rules, the race and its end."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from grpo_kernels._math_triton import LOG2E, LOWEST
from grpo_kernels._tiles_triton import tile
from grpo_kernels.speculative_sampling._tiles_triton import (
    EXCLUDED,
    FAULT,
    NO_TOKEN,
    PLAIN,
    RECORD,
    RESIDUAL,
    is_sound,
    length_of,
    load_logits,
    log_prob,
    merged,
    row_of,
    scale_of,
    softmax_of,
    uniform,
)


@triton.jit(do_not_specialize=["drafts", "sources", "splits"])
def statistics_kernel(
    target,
    draft,
    draft_lengths,
    temperatures,
    partials,
    partial_ids,
    candidates,
    vocab,
    drafts,
    sources,
    splits,
    columns,
    target_batch_stride,
    target_stride,
    draft_batch_stride,
    draft_stride,
    HAS_DRAFT: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_TEMPERATURES: tl.constexpr,
    GREEDY: tl.constexpr,
    ROOM: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
):
    # Program (s, c) owns part c of row s of logits: the target's K + 1 positions, then the draft's K, of every sequence.
    # Reads each element once and writes the largest and a sum of e^z relative to it: 8 bytes, 12 where the place of the
    # largest is wanted, and for a filter of long rows the largest of each slot. A slot is a thread's: it keeps both in
    # registers, so that the loop has no barrier and no shuffle. What lies behind a sequence's drafts is not read. The
    # next tile loads while this one is reduced.
    source = tl.program_id(0)
    row, start_of_row, wanted = row_of(
        source, target, draft, draft_lengths, drafts, sources, target_batch_stride, target_stride, draft_batch_stride,
        draft_stride, HAS_DRAFT, HAS_LENGTHS,
    )  # fmt: skip
    if wanted:
        scale, _ = scale_of(temperatures, row, HAS_TEMPERATURES)
        split = tl.program_id(1)
        begin = split * columns
        end = tl.minimum(begin + columns, vocab)
        BLOCK: tl.constexpr = SLOTS * WIDTH
        largest = tl.full((SLOTS,), LOWEST, tl.float32)
        total = tl.zeros((SLOTS,), tl.float32)
        first = tl.zeros((SLOTS,), tl.int32)
        following = load_logits(start_of_row, begin, end, SLOTS, WIDTH, NEIGHBOURS)
        for start in range(begin, end, BLOCK):
            x = following
            following = load_logits(start_of_row, start + BLOCK, end, SLOTS, WIDTH, NEIGHBOURS)
            larger = tl.maximum(largest, tl.max(x, axis=1))
            if GREEDY:
                first = tl.where(larger > largest, start, first)
            total = total * tl.exp2((largest - larger) * scale * LOG2E)
            largest = larger
            total += tl.sum(tl.exp2((x - largest[:, None]) * scale * LOG2E), axis=1)
        top = tl.max(largest, axis=0)
        place = partials + source.to(tl.int64) * (2 * splits) + split
        tl.store(place, top)
        tl.store(place + splits, tl.sum(total * tl.exp2((largest - top) * scale * LOG2E), axis=0))
        if ROOM > 0:
            group = split * SLOTS + tl.arange(0, SLOTS)
            # Of a group without a finite logit there is nothing to count.
            finite = tl.where(largest > LOWEST, largest, float("-inf")).to(candidates.dtype.element_ty)
            tl.store(candidates + source.to(tl.int64) * ROOM + group, finite)
        if GREEDY:
            # The slots that hold the largest remember the tile where they met it; the earliest one holds the lowest id.
            origin = tl.min(tl.where(largest == top, first, NO_TOKEN), axis=0)
            origin = tl.where(origin == NO_TOKEN, begin, tl.maximum(origin, begin))
            x = load_logits(start_of_row, origin, end, SLOTS, WIDTH, NEIGHBOURS)
            ids = tile(origin, SLOTS, WIDTH, NEIGHBOURS)
            tl.store(partial_ids + source.to(tl.int64) * splits + split, tl.min(tl.where(x == top, ids, NO_TOKEN)))


@triton.jit
def has_faults(draft_ids, top_p, row, length, vocab, drafts, HAS_TOP_P: tl.constexpr, SPLITS: tl.constexpr):
    """Whether one of a row's drafts is outside the vocabulary, or its top_p outside (0, 1]."""
    found = row < 0
    for start in range(0, length, SPLITS):
        index = start + tl.arange(0, SPLITS)
        ids = tl.load(draft_ids + row * drafts + index, mask=index < length, other=0)
        found = found | (tl.max(((ids < 0) | (ids >= vocab)).to(tl.int32), axis=0) != 0)
    if HAS_TOP_P:
        share = tl.load(top_p + row)
        found = found | (((share > 0.0) & (share <= 1.0)) == 0)
    return found


@triton.jit
def finish(
    row, accepted, length, fault, log2_weight, partials, masses, thresholds, token_ids, num_accepted, log_probs,
    records, kinds, drafts, sources, splits, scale, HAS_DRAFT: tl.constexpr, FILTERED: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """Writes what is behind the accepted drafts, and what the race needs to know."""
    source = row * sources + accepted
    top, total, mass, threshold = softmax_of(partials, masses, thresholds, source, splits, scale, FILTERED, SPLITS)
    fault = fault | (is_sound(total) == 0)
    rejected = accepted < length
    record = records + row * RECORD
    tl.store(record, top)
    tl.store(record + 1, tl.where(rejected, log2_weight, 0.0) - tl.log2(mass))
    tl.store(record + 2, threshold)
    tl.store(record + 6, tl.log(total))
    if HAS_DRAFT:
        draft_top, draft_mass, draft_threshold = 0.0, 1.0, float("-inf")
        if rejected & (fault == 0):
            draft_top, _, draft_mass, draft_threshold = softmax_of(
                partials, masses, thresholds, source + drafts + 1, splits, scale, FILTERED, SPLITS
            )
        tl.store(record + 3, draft_top)
        tl.store(record + 4, -tl.log2(draft_mass))
        tl.store(record + 5, draft_threshold)
        kind = tl.where(rejected, RESIDUAL, PLAIN)
    else:
        kind = tl.where(rejected, EXCLUDED, PLAIN)
    tl.store(kinds + row, tl.where(fault, FAULT, kind))
    tl.store(num_accepted + row, accepted.to(tl.int64))
    for start in range(accepted, drafts + 1, SPLITS):
        index = start + tl.arange(0, SPLITS)
        place = row * (drafts + 1) + index
        nothing = tl.where((index == accepted) & fault, float("nan"), 0.0)
        tl.store(token_ids + place, tl.full((SPLITS,), -1, tl.int64), mask=index <= drafts)
        tl.store(log_probs + place, nothing, mask=index <= drafts)


@triton.jit(do_not_specialize=["drafts", "sources", "splits", "vocab"])
def token_kernel(
    target,
    draft,
    draft_ids,
    draft_lengths,
    temperatures,
    top_p,
    seeds,
    offsets,
    partials,
    masses,
    thresholds,
    token_ids,
    num_accepted,
    log_probs,
    records,
    kinds,
    vocab,
    drafts,
    sources,
    splits,
    target_batch_stride,
    target_stride,
    draft_batch_stride,
    draft_stride,
    HAS_DRAFT: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_TEMPERATURES: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    FILTERED: tl.constexpr,
    SPLITS: tl.constexpr,
):
    # One program, one warp, owns a sequence: it merges the parts of one position after another, as long as drafts are
    # accepted. Reads 8 bytes a part and the logits of the drafts; writes the accepted drafts, their log-probs, and
    # which position the race is for.
    row = tl.program_id(0).to(tl.int64)
    length, fitting = length_of(draft_lengths, row, drafts, HAS_LENGTHS)
    scale, positive = scale_of(temperatures, row, HAS_TEMPERATURES)
    fault = (fitting & positive) == 0
    fault = fault | has_faults(draft_ids, top_p, row, length, vocab, drafts, HAS_TOP_P, SPLITS)
    seed = tl.load(seeds + row)
    offset = seed * 0
    if HAS_OFFSETS:
        offset = tl.load(offsets + row)
    accepted = tl.zeros((), tl.int32)
    going = fault == 0
    while going & (accepted < length):
        source = row * sources + accepted
        top, total, mass, threshold = softmax_of(partials, masses, thresholds, source, splits, scale, FILTERED, SPLITS)
        token = tl.load(draft_ids + row * drafts + accepted).to(tl.int64)
        x = tl.load(target + row * target_batch_stride + accepted.to(tl.int64) * target_stride + token).to(tl.float32)
        log_p = log_prob(x, top, scale, mass, threshold)
        sound = is_sound(total)
        ratio = tl.exp(log_p)
        if HAS_DRAFT:
            y = tl.load(draft + row * draft_batch_stride + accepted.to(tl.int64) * draft_stride + token).to(tl.float32)
            draft_top, draft_total, draft_mass, draft_threshold = softmax_of(
                partials, masses, thresholds, source + drafts + 1, splits, scale, FILTERED, SPLITS
            )
            log_q = log_prob(y, draft_top, scale, draft_mass, draft_threshold)
            sound = sound & is_sound(draft_total)
            ratio = tl.where(log_q > float("-inf"), tl.exp(log_p - log_q), 0.0)
        fault = sound == 0
        going = sound & (uniform(seed, offset, accepted) < ratio)
        place = row * (drafts + 1) + accepted
        tl.store(token_ids + place, token, mask=going)
        tl.store(log_probs + place, log_prob(x, top, scale, total, float("-inf")), mask=going)
        accepted += going.to(tl.int32)
    finish(
        row, accepted, length, fault, 0.0, partials, masses, thresholds, token_ids, num_accepted, log_probs, records,
        kinds, drafts, sources, splits, scale, HAS_DRAFT, FILTERED, SPLITS,
    )  # fmt: skip


@triton.jit
def likeliest(partials, partial_ids, source, splits, scale, SPLITS: tl.constexpr):
    """The lowest id among the largest logits of a row, the sum of e^z relative to it, and whether the row is sound."""
    top, total = merged(partials, source, splits, scale, SPLITS)
    split = tl.arange(0, SPLITS)
    inside = split < splits
    x = tl.load(partials + source * (2 * splits) + split, mask=inside, other=LOWEST)
    ids = tl.load(partial_ids + source * splits + split, mask=inside, other=NO_TOKEN)
    return tl.min(tl.where(x == top, ids, NO_TOKEN), axis=0).to(tl.int64), total, is_sound(total)


@triton.jit(do_not_specialize=["drafts", "splits", "vocab"])
def greedy_kernel(
    draft_ids,
    draft_lengths,
    temperatures,
    partials,
    partial_ids,
    token_ids,
    num_accepted,
    log_probs,
    vocab,
    drafts,
    splits,
    HAS_LENGTHS: tl.constexpr,
    HAS_TEMPERATURES: tl.constexpr,
    SPLITS: tl.constexpr,
):
    # One program, one warp, owns a sequence and writes all its outputs. Reads 12 bytes a part of every position that it
    # comes to.
    row = tl.program_id(0).to(tl.int64)
    length, fitting = length_of(draft_lengths, row, drafts, HAS_LENGTHS)
    scale, positive = scale_of(temperatures, row, HAS_TEMPERATURES)
    fault = (fitting & positive) == 0
    fault = fault | has_faults(draft_ids, temperatures, row, length, vocab, drafts, False, SPLITS)
    accepted = tl.zeros((), tl.int32)
    position = tl.zeros((), tl.int32)
    going = fault == 0
    place = row * (drafts + 1)
    while going & (position <= length):
        best, total, sound = likeliest(partials, partial_ids, row * (drafts + 1) + position, splits, scale, SPLITS)
        fault = sound == 0
        tl.store(token_ids + place + position, best, mask=sound)
        tl.store(log_probs + place + position, -tl.log(total), mask=sound)
        inside = position < length
        token = tl.load(draft_ids + row * drafts + position, mask=inside, other=-1).to(tl.int64)
        going = sound & inside & (token == best)
        accepted += going.to(tl.int32)
        position += 1
    tl.store(num_accepted + row, accepted.to(tl.int64))
    for start in range(0, drafts + 1, SPLITS):
        index = start + tl.arange(0, SPLITS)
        behind = (index <= drafts) & ((index > accepted) | ((index == accepted) & fault))
        nothing = tl.where((index == accepted) & fault, float("nan"), 0.0)
        tl.store(token_ids + place + index, tl.full((SPLITS,), -1, tl.int64), mask=behind)
        tl.store(log_probs + place + index, nothing, mask=behind)
