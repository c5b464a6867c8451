"""The Triton kernel of verify_draft's filters: top-k and top-p as a threshold on the logits of a row."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from grpo_kernels._math_triton import LOG2E
from grpo_kernels.speculative_sampling._gather_triton import gather
from grpo_kernels.speculative_sampling._tiles_triton import is_sound, load_logits, merged, row_of, scale_of

SIGN = tl.constexpr(-(2**31))


@triton.jit
def key_of(x, SHIFT: tl.constexpr):
    """A number that grows with x: the bits of a float32 without the last ones, which logits of 16 bits do not have."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | SIGN)).to(tl.uint32, bitcast=True) >> SHIFT


@triton.jit
def value_of(key, SHIFT: tl.constexpr):
    """The logit of a key."""
    bits = (key << SHIFT).to(tl.int32, bitcast=True)
    rest = tl.where(bits < 0, 0, (1 << SHIFT) - 1)
    bits = (bits | rest) ^ (((bits ^ SIGN) >> 31) | SIGN)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def added(count, mass, x, least, e, MASS: tl.constexpr):
    """A slot's count, and sum of e^z, with those of its logits in a tile that are not below `least`."""
    inside = tl.where(x >= least, 1.0, 0.0)
    count += tl.sum(inside, axis=1)
    if MASS:
        mass += tl.sum(inside * e, axis=1)  # e is finite: the factor selects, in the instruction that adds
    return count, mass


@triton.jit
def survey(
    row, vocab, a, b, c, top, scale, MASS: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
):  # fmt: skip
    """How many logits of a row are not below each of three, and the sum of their e^z (else those numbers again)."""
    count_a = tl.zeros((SLOTS,), tl.float32)
    count_b = tl.zeros((SLOTS,), tl.float32)
    count_c = tl.zeros((SLOTS,), tl.float32)
    mass_a = tl.zeros((SLOTS,), tl.float32)
    mass_b = tl.zeros((SLOTS,), tl.float32)
    mass_c = tl.zeros((SLOTS,), tl.float32)
    for start in range(0, vocab, SLOTS * WIDTH):
        x = load_logits(row, start, vocab, SLOTS, WIDTH, NEIGHBOURS)
        e = x
        if MASS:
            e = tl.exp2((x - top) * scale * LOG2E)
        count_a, mass_a = added(count_a, mass_a, x, a, e, MASS)
        count_b, mass_b = added(count_b, mass_b, x, b, e, MASS)
        count_c, mass_c = added(count_c, mass_c, x, c, e, MASS)
    # A slot counts in floats, exactly: sums of truth values become code that goes through local memory.
    number_a = tl.sum(count_a.to(tl.int32), axis=0)
    number_b = tl.sum(count_b.to(tl.int32), axis=0)
    number_c = tl.sum(count_c.to(tl.int32), axis=0)
    if MASS:
        found_a, found_b, found_c = tl.sum(mass_a, axis=0), tl.sum(mass_b, axis=0), tl.sum(mass_c, axis=0)
    else:
        found_a, found_b, found_c = number_a.to(tl.float32), number_b.to(tl.float32), number_c.to(tl.float32)
    return number_a, number_b, number_c, found_a, found_b, found_c


@triton.jit
def pivots(low, high, turn, MASS: tl.constexpr, SHIFT: tl.constexpr):
    """The logits of three keys between two, in their order."""
    quarter = tl.maximum((high - low) // 4, 1)
    a, b, c = low + quarter, low + (high - low) // 2, high - quarter
    if MASS:
        # What holds mass lies within a few nats, where logits part tokens better than keys, most of which are near zero.
        least = value_of(low, SHIFT)
        step = (value_of(high - 1, SHIFT) - least) * 0.25
        if turn < 6:
            a = tl.minimum(tl.maximum(key_of(least + step, SHIFT), low + 1), high - 1)
            b = tl.minimum(tl.maximum(key_of(least + 2.0 * step, SHIFT), a), high - 1)
            c = tl.minimum(tl.maximum(key_of(least + 3.0 * step, SHIFT), b), high - 1)
    return value_of(a, SHIFT), value_of(b, SHIFT), value_of(c, SHIFT)


@triton.jit
def search(
    row, vocab, low, high, goal, top, scale, ENOUGH: tl.constexpr, MASS: tl.constexpr, SHIFT: tl.constexpr,
    SLOTS: tl.constexpr, WIDTH: tl.constexpr, NEIGHBOURS: tl.constexpr,
):  # fmt: skip
    """The largest key in [low, high) at which the logits that are not below reach the goal, or one that they do not
    differ for; that is, if ENOUGH is 1: else one that is not above it, with at most so many logits up to the second key.
    Then how many are not below the first, and what of the goal those from the second on hold. Reads the row once for two
    bits of the key."""
    above_low = vocab + (low * 0).to(tl.int32)
    above_high = above_low * 0
    beyond = goal * 0.0
    turn = above_low * 0
    # One logit between them, or (for top-k) the goal itself: there is nothing left to tell apart.
    while (high - low > 1) & (above_low - above_high > ENOUGH):
        a, b, c = pivots(low, high, turn, MASS, SHIFT)
        number_a, number_b, number_c, found_a, found_b, found_c = survey(
            row, vocab, a, b, c, top, scale, MASS, SLOTS, WIDTH, NEIGHBOURS,
        )  # fmt: skip
        # The keys come from the logits again: kept beside them, they are three registers more than there are.
        past_a, past_b, past_c = found_a >= goal, found_b >= goal, found_c >= goal
        high = tl.where(past_c, high, key_of(tl.where(past_b, c, tl.where(past_a, b, a)), SHIFT))
        above_high = tl.where(past_c, above_high, tl.where(past_b, number_c, tl.where(past_a, number_b, number_a)))
        beyond = tl.where(past_c, beyond, tl.where(past_b, found_c, tl.where(past_a, found_b, found_a)))
        low = tl.where(past_a, key_of(tl.where(past_c, c, tl.where(past_b, b, a)), SHIFT), low)
        above_low = tl.where(past_c, number_c, tl.where(past_b, number_b, tl.where(past_a, number_a, above_low)))
        if not MASS:
            above_high = tl.where(above_low.to(tl.float32) == goal, above_low, above_high)
        turn += 1
    return low, high, above_low, beyond


@triton.jit
def mass_from(row, vocab, least, top, scale, SLOTS: tl.constexpr, WIDTH: tl.constexpr, NEIGHBOURS: tl.constexpr):
    """Sum of e^z of the logits that are not below `least`."""
    total = tl.zeros((SLOTS,), tl.float32)
    for start in range(0, vocab, SLOTS * WIDTH):
        x = load_logits(row, start, vocab, SLOTS, WIDTH, NEIGHBOURS)
        total += tl.sum(tl.where(x >= least, tl.exp2((x - top) * scale * LOG2E), 0.0), axis=1)
    return tl.sum(total, axis=0)


@triton.jit
def narrowed(
    row, vocab, own, groups, fresh, low, high, goal, top, scale, MASS: tl.constexpr, SHIFT: tl.constexpr,
    ROOM: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr, NEIGHBOURS: tl.constexpr,
):  # fmt: skip
    """Where to search and how long it is, between which keys, and what of the goal lies beyond them: few logits, copied to
    `own`, or the row, if those do not fit. `fresh`: `own` holds the largest logits of the row's groups."""
    logits, count = row, vocab
    beyond = goal * 0.0
    many = vocab > 0
    if fresh:
        # Where the largest logits reach the goal without the others, all do.
        found = search(own, groups, low, high, goal, top, scale, 1, MASS, SHIFT, SLOTS, WIDTH, NEIGHBOURS)
        many = (found[0] == low) | (found[2] > 2 * SLOTS)
        low = found[0]
    if many:
        low, high, _, beyond = search(
            row, vocab, low, high, goal, top, scale, 4 * SLOTS, MASS, SHIFT, SLOTS, WIDTH, NEIGHBOURS
        )  # fmt: skip
    copied = gather(row, vocab, own, value_of(low, SHIFT), value_of(high, SHIFT), ROOM, SLOTS, WIDTH, NEIGHBOURS)
    if copied > 0:
        logits, count = own, copied
    else:
        beyond = goal * 0.0
    return logits, count, low, high, beyond


@triton.jit(do_not_specialize=["drafts", "sources", "splits"])
def filter_kernel(
    target,
    draft,
    draft_lengths,
    temperatures,
    top_k,
    top_p,
    partials,
    candidates,
    masses,
    thresholds,
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
    HAS_TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    SHIFT: tl.constexpr,
    SPLITS: tl.constexpr,
    GROUPS: tl.constexpr,
    ROOM: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
):
    # One program owns one row of logits, target or draft, and searches its threshold between keys that grow with the
    # logits: each read of what it searches in compares with three pivots and so tells two bits of the key, at most 10
    # times for 16-bit logits (17 for float32), for top-p up to 6 times before with pivots that part nats, fewer as soon
    # as the pivots part the tokens; once more between the filters and once for the sum of what is kept. Of a row of
    # several tiles it first searches in the largest logits of groups of tokens, which the statistics left in
    # `candidates`, then reads the row once and copies what may be kept over them, a few tokens of most models, and
    # searches in these. If they do not fit it searches in the row. Writes 8 bytes.
    source = tl.program_id(0)
    row, start_of_row, wanted = row_of(
        source, target, draft, draft_lengths, drafts, sources, target_batch_stride, target_stride, draft_batch_stride,
        draft_stride, HAS_DRAFT, HAS_LENGTHS,
    )  # fmt: skip
    if wanted:
        scale, _ = scale_of(temperatures, row, HAS_TEMPERATURES)
        top, mass = merged(partials, source.to(tl.int64), splits, scale, SPLITS)
        if is_sound(mass):
            low = key_of(top * 0.0 - float("inf"), SHIFT)
            # -0.0 as +0.0, whose key is the next: what is below the second key has to hold the largest logit.
            high = key_of(tl.where(top == 0.0, 0.0, top), SHIFT) + 1
            logits, count = start_of_row, vocab
            own = candidates + source.to(tl.int64) * ROOM
            groups = splits * GROUPS
            fresh = wanted
            if HAS_TOP_K:
                k = tl.load(top_k + row)
                if (k > 0) & (k < vocab):
                    goal = k.to(tl.float32)
                    below = high
                    if ROOM > 0:
                        logits, count, low, below, beyond = narrowed(
                            start_of_row, vocab, own, groups, fresh, low, high, goal, top, scale, False, SHIFT, ROOM,
                            SLOTS, WIDTH, NEIGHBOURS,
                        )  # fmt: skip
                        goal -= beyond
                        fresh = k < 0
                    low = search(
                        logits, count, low, below, goal, top, scale, 1, False, SHIFT, SLOTS, WIDTH, NEIGHBOURS
                    )[0]  # fmt: skip
                    if below != high:
                        logits, count = start_of_row, vocab
                    mass = mass_from(logits, count, value_of(low, SHIFT), top, scale, SLOTS, WIDTH, NEIGHBOURS)
            if HAS_TOP_P:
                share = tl.load(top_p + row)
                if (share > 0.0) & (share < 1.0):
                    # All that is less likely than this, together, is less than what may be left out.
                    depth = tl.log(tl.cast(vocab, tl.float32) / (1.0 - share)) + 1.0
                    low = tl.maximum(low, key_of(top - depth / scale, SHIFT))
                    goal = share * mass
                    beyond = 0.0
                    if ROOM > 0:
                        if count == vocab:
                            logits, count, low, high, beyond = narrowed(
                                start_of_row, vocab, own, groups, fresh, low, high, goal, top, scale, True, SHIFT,
                                ROOM, SLOTS, WIDTH, NEIGHBOURS,
                            )  # fmt: skip
                    low = search(
                        logits, count, low, high, goal - beyond, top, scale, 1, True, SHIFT, SLOTS, WIDTH, NEIGHBOURS
                    )[0]  # fmt: skip
                    mass = mass_from(logits, count, value_of(low, SHIFT), top, scale, SLOTS, WIDTH, NEIGHBOURS)
                    mass += beyond
            tl.store(thresholds + source, value_of(low, SHIFT))
            tl.store(masses + source, mass)
