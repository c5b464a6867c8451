"""The Triton kernels of verify_draft's block rule: the chain of ratios, the residuals' masses, and the decision."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from grpo_kernels._math_triton import LOG2E
from grpo_kernels.speculative_sampling._kernels_triton import finish, has_faults
from grpo_kernels.speculative_sampling._race_triton import weights
from grpo_kernels.speculative_sampling._tiles_triton import (
    is_sound,
    length_of,
    load_logits,
    log_prob,
    scale_of,
    softmax_of,
    uniform,
)


@triton.jit(do_not_specialize=["drafts", "sources", "splits", "vocab"])
def chain_kernel(
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
    log_probs,
    chain,
    window,
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
    # One program, one warp, owns a sequence. Writes log P_i for every position, every draft and its log-prob (the decision
    # takes back those that are not accepted), and between which positions the decision is open: that behind the last
    # P_i = 1 is certain, and none is open if all drafts are accepted. -1: the sequence has a fault.
    row = tl.program_id(0).to(tl.int64)
    length, fitting = length_of(draft_lengths, row, drafts, HAS_LENGTHS)
    scale, positive = scale_of(temperatures, row, HAS_TEMPERATURES)
    fault = (fitting & positive) == 0
    fault = fault | has_faults(draft_ids, top_p, row, length, vocab, drafts, HAS_TOP_P, SPLITS)
    length = tl.where(fault, 0, length)
    log_weight = 0.0
    certain = tl.zeros((), tl.int32)
    tl.store(chain + row * (drafts + 1), 0.0)
    for i in range(0, length):
        source = row * sources + i
        top, total, mass, threshold = softmax_of(partials, masses, thresholds, source, splits, scale, FILTERED, SPLITS)
        token = tl.load(draft_ids + row * drafts + i).to(tl.int64)
        x = tl.load(target + row * target_batch_stride + tl.cast(i, tl.int64) * target_stride + token).to(tl.float32)
        ratio = log_prob(x, top, scale, mass, threshold)
        fault = fault | (is_sound(total) == 0)
        if HAS_DRAFT:
            y = tl.load(draft + row * draft_batch_stride + tl.cast(i, tl.int64) * draft_stride + token).to(tl.float32)
            draft_top, draft_total, draft_mass, draft_threshold = softmax_of(
                partials, masses, thresholds, source + drafts + 1, splits, scale, FILTERED, SPLITS
            )
            fault = fault | (is_sound(draft_total) == 0)
            log_q = log_prob(y, draft_top, scale, draft_mass, draft_threshold)
            ratio = tl.where(log_q > float("-inf"), ratio - log_q, float("-inf"))
        log_weight = tl.minimum(log_weight + ratio, 0.0)
        certain = tl.where(log_weight == 0.0, i + 1, certain)
        tl.store(chain + row * (drafts + 1) + i + 1, log_weight)
        tl.store(token_ids + row * (drafts + 1) + i, token)
        tl.store(log_probs + row * (drafts + 1) + i, log_prob(x, top, scale, total, float("-inf")))
    seed = tl.load(seeds + row)
    offset = seed * 0
    if HAS_OFFSETS:
        offset = tl.load(offsets + row)
    passed = uniform(seed, offset, length - 1) < tl.exp(log_weight)
    certain = tl.where(passed, length, certain)
    tl.store(window + row, tl.where(fault, -1, certain))


@triton.jit(do_not_specialize=["drafts", "sources", "splits"])
def residual_kernel(
    target,
    draft,
    draft_lengths,
    temperatures,
    partials,
    masses,
    thresholds,
    chain,
    window,
    residuals,
    vocab,
    drafts,
    sources,
    splits,
    columns,
    target_batch_stride,
    target_stride,
    draft_batch_stride,
    draft_stride,
    HAS_LENGTHS: tl.constexpr,
    HAS_TEMPERATURES: tl.constexpr,
    FILTERED: tl.constexpr,
    SPLITS: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
):
    # Program (s, c) owns part c of one of the positions 1 .. K - 1 of a sequence: sums max(P p - q, 0) and writes 4 bytes.
    # Reads both logits once where the decision is open, and nothing elsewhere.
    row = (tl.program_id(0) // (drafts - 1)).to(tl.int64)
    position = tl.program_id(0) % (drafts - 1) + 1
    length, fitting = length_of(draft_lengths, row, drafts, HAS_LENGTHS)
    certain = tl.load(window + row)
    if fitting & (certain >= 0) & (position > certain) & (position < length):
        scale, _positive = scale_of(temperatures, row, HAS_TEMPERATURES)
        source = row * sources + position
        top, _total, mass, threshold = softmax_of(partials, masses, thresholds, source, splits, scale, FILTERED, SPLITS)
        draft_top, _draft_total, draft_mass, draft_threshold = softmax_of(
            partials, masses, thresholds, source + drafts + 1, splits, scale, FILTERED, SPLITS
        )
        log_weight = tl.load(chain + row * (drafts + 1) + position)
        log2_weight = log_weight * LOG2E - tl.log2(mass)
        draft_weight = -tl.log2(draft_mass)
        index = position.to(tl.int64)
        target_row = target + row * target_batch_stride + index * target_stride
        draft_row = draft + row * draft_batch_stride + index * draft_stride
        split = tl.program_id(1)
        begin = split * columns
        end = tl.minimum(begin + columns, vocab)
        rest = tl.zeros((SLOTS,), tl.float32)
        for start in range(begin, end, SLOTS * WIDTH):
            x = load_logits(target_row, start, end, SLOTS, WIDTH, NEIGHBOURS)
            y = load_logits(draft_row, start, end, SLOTS, WIDTH, NEIGHBOURS)
            p = weights(x, top, scale, log2_weight, threshold, FILTERED)
            q = weights(y, draft_top, scale, draft_weight, draft_threshold, FILTERED)
            rest += tl.sum(tl.maximum(p - q, 0.0), axis=1)
        tl.store(residuals + (row * drafts + position) * splits + split, tl.sum(rest, axis=0))


@triton.jit(do_not_specialize=["drafts", "sources", "splits"])
def block_kernel(
    target,
    draft_ids,
    draft_lengths,
    temperatures,
    seeds,
    offsets,
    partials,
    masses,
    thresholds,
    chain,
    window,
    residuals,
    token_ids,
    num_accepted,
    log_probs,
    records,
    kinds,
    drafts,
    sources,
    splits,
    target_batch_stride,
    target_stride,
    HAS_DRAFT: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_TEMPERATURES: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    FILTERED: tl.constexpr,
    SPLITS: tl.constexpr,
):
    # One program, one warp, owns a sequence: from its last open position down, the first that passes ends the search.
    # Reads 4 bytes a part of each, writes which position the race is for.
    row = tl.program_id(0).to(tl.int64)
    length, _fitting = length_of(draft_lengths, row, drafts, HAS_LENGTHS)
    scale, _positive = scale_of(temperatures, row, HAS_TEMPERATURES)
    certain = tl.load(window + row)
    fault = certain < 0
    certain = tl.maximum(certain, 0)
    seed = tl.load(seeds + row)
    offset = seed * 0
    if HAS_OFFSETS:
        offset = tl.load(offsets + row)
    accepted = tl.where(certain == length, length, tl.maximum(length - 1, certain))
    accepted = tl.where(fault, 0, accepted)
    split = tl.arange(0, SPLITS)
    searching = fault == 0
    while searching & (accepted > certain):
        log_weight = tl.load(chain + row * (drafts + 1) + accepted)
        weight = tl.exp(log_weight)
        if HAS_DRAFT:
            place = residuals + (row * drafts + accepted) * splits + split
            mass = tl.sum(tl.load(place, mask=split < splits, other=0.0), axis=0)
        else:  # P (1 - p(x)), all but the draft
            source = row * sources + accepted
            top, _total, kept, threshold = softmax_of(
                partials, masses, thresholds, source, splits, scale, FILTERED, SPLITS
            )
            token = tl.load(draft_ids + row * drafts + accepted).to(tl.int64)
            x = tl.load(target + row * target_batch_stride + accepted.to(tl.int64) * target_stride + token)
            mass = weight * (1.0 - tl.exp(log_prob(x.to(tl.float32), top, scale, kept, threshold)))
        rest = mass + (1.0 - weight)
        bound = tl.where(rest > 0.0, mass / rest, 1.0)
        passed = uniform(seed, offset, accepted - 1) < bound
        searching = passed == 0
        accepted = tl.where(passed, accepted, accepted - 1)
    log2_weight = tl.load(chain + row * (drafts + 1) + accepted) * LOG2E
    finish(
        row, accepted, length, fault, log2_weight, partials, masses, thresholds, token_ids, num_accepted, log_probs,
        records, kinds, drafts, sources, splits, scale, HAS_DRAFT, FILTERED, SPLITS,
    )  # fmt: skip
