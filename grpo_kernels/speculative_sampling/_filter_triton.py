"""The Triton kernel of verify_draft's filters: top-k and top-p as a threshold on the logits of a row."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from grpo_kernels._math_triton import LOG2E
from grpo_kernels.speculative_sampling._tiles_triton import is_sound, load_tile, merged, row_of, scale_of

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
        x = load_tile(row, start, vocab, SLOTS, WIDTH, NEIGHBOURS)
        count_a += tl.sum(tl.where(x >= a, 1.0, 0.0), axis=1)
        count_b += tl.sum(tl.where(x >= b, 1.0, 0.0), axis=1)
        count_c += tl.sum(tl.where(x >= c, 1.0, 0.0), axis=1)
        if MASS:
            e = tl.exp2((x - top) * scale * LOG2E)
            mass_a += tl.sum(tl.where(x >= a, e, 0.0), axis=1)
            mass_b += tl.sum(tl.where(x >= b, e, 0.0), axis=1)
            mass_c += tl.sum(tl.where(x >= c, e, 0.0), axis=1)
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
def search(
    row, vocab, low, high, goal, top, scale, MASS: tl.constexpr, SHIFT: tl.constexpr, SLOTS: tl.constexpr,
    WIDTH: tl.constexpr, NEIGHBOURS: tl.constexpr,
):  # fmt: skip
    """The largest key in [low, high) at which the logits that are not below reach the goal, or one that they do not
    differ for. Reads the row once for two bits of the key."""
    above_low = vocab + (low * 0).to(tl.int32)
    above_high = above_low * 0
    # One logit between them, or (for top-k) the goal itself: there is nothing left to tell apart.
    while (high - low > 1) & (above_low - above_high > 1):
        quarter = tl.maximum((high - low) // 4, 1)
        a, b, c = low + quarter, low + (high - low) // 2, high - quarter
        number_a, number_b, number_c, found_a, found_b, found_c = survey(
            row, vocab, value_of(a, SHIFT), value_of(b, SHIFT), value_of(c, SHIFT), top, scale,
            MASS, SLOTS, WIDTH, NEIGHBOURS,
        )  # fmt: skip
        past_a, past_b, past_c = found_a >= goal, found_b >= goal, found_c >= goal
        high = tl.where(past_c, high, tl.where(past_b, c, tl.where(past_a, b, a)))
        above_high = tl.where(past_c, above_high, tl.where(past_b, number_c, tl.where(past_a, number_b, number_a)))
        low = tl.where(past_c, c, tl.where(past_b, b, tl.where(past_a, a, low)))
        above_low = tl.where(past_c, number_c, tl.where(past_b, number_b, tl.where(past_a, number_a, above_low)))
        if not MASS:
            above_high = tl.where(above_low.to(tl.float32) == goal, above_low, above_high)
    return low


@triton.jit
def mass_from(row, vocab, least, top, scale, SLOTS: tl.constexpr, WIDTH: tl.constexpr, NEIGHBOURS: tl.constexpr):
    """Sum of e^z of the logits that are not below `least`."""
    total = tl.zeros((SLOTS,), tl.float32)
    for start in range(0, vocab, SLOTS * WIDTH):
        x = load_tile(row, start, vocab, SLOTS, WIDTH, NEIGHBOURS)
        total += tl.sum(tl.where(x >= least, tl.exp2((x - top) * scale * LOG2E), 0.0), axis=1)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["drafts", "sources", "splits"])
def filter_kernel(
    target,
    draft,
    draft_lengths,
    temperatures,
    top_k,
    top_p,
    partials,
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
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
):
    # One program owns one row of logits, target or draft, and searches its threshold between keys that grow with the
    # logits: each read of the row, from the L2 cache but for the first, compares with three pivots and so tells two bits
    # of the key. At most 8 reads for a filter of 16-bit logits (16 for float32), fewer as soon as the pivots part the
    # tokens; one more between the filters and one for the sum of what is kept. Writes 8 bytes.
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
            high = key_of(top, SHIFT) + 1
            if HAS_TOP_K:
                k = tl.load(top_k + row)
                if (k > 0) & (k < vocab):
                    goal = k.to(tl.float32)
                    low = search(
                        start_of_row, vocab, low, high, goal, top, scale, False, SHIFT, SLOTS, WIDTH, NEIGHBOURS
                    )  # fmt: skip
                    least = value_of(low, SHIFT)
                    mass = mass_from(start_of_row, vocab, least, top, scale, SLOTS, WIDTH, NEIGHBOURS)
            if HAS_TOP_P:
                share = tl.load(top_p + row)
                if (share > 0.0) & (share < 1.0):
                    # All that is less likely than this, together, is less than what may be left out.
                    depth = tl.log(tl.cast(vocab, tl.float32) / (1.0 - share)) + 1.0
                    low = tl.maximum(low, key_of(top - depth / scale, SHIFT))
                    low = search(
                        start_of_row, vocab, low, high, share * mass, top, scale, True, SHIFT, SLOTS, WIDTH, NEIGHBOURS
                    )  # fmt: skip
                    least = value_of(low, SHIFT)
                    mass = mass_from(start_of_row, vocab, least, top, scale, SLOTS, WIDTH, NEIGHBOURS)
            tl.store(thresholds + source, value_of(low, SHIFT))
            tl.store(masses + source, mass)
