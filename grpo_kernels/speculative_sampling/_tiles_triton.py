"""What the Triton kernels of speculative_sampling share: tiles of a row, its statistics, and the noise."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from grpo_kernels._math_triton import LOG2E, LOWEST
from grpo_kernels._tiles_triton import load_tile

NO_TOKEN = tl.constexpr(2147483647)
RECORD = tl.constexpr(8)
"""What the race takes of a row: of the target the largest logit, log2 of what its e^z are multiplied by and the least
logit kept; the same of the draft; the log of the target's sum before filters."""
LARGEST = tl.constexpr(3.4028234663852886e38)
UNIT = tl.constexpr(2.0**-32)
ACCEPTANCE = tl.constexpr(0)  # streams of the noise
RACE = tl.constexpr(1)
FAULT = tl.constexpr(-1)  # kinds of the last token: there is none; from p; from the residual; from p without the draft
PLAIN = tl.constexpr(0)
RESIDUAL = tl.constexpr(1)
EXCLUDED = tl.constexpr(2)


@triton.jit
def load_logits(row, start, end, SLOTS: tl.constexpr, WIDTH: tl.constexpr, NEIGHBOURS: tl.constexpr):
    """Columns [start, end) of a row in float32, -inf behind them."""
    return load_tile(row, start, end, float("-inf"), SLOTS, WIDTH, NEIGHBOURS).to(tl.float32)


@triton.jit
def scale_of(temperatures, row, HAS_TEMPERATURES: tl.constexpr):
    """1 / temperature, finite, and whether the temperature is."""
    scale = 1.0
    sound = row >= 0
    if HAS_TEMPERATURES:
        temperature = tl.load(temperatures + row)
        sound = (temperature > 0.0) & (temperature < float("inf"))
        scale = tl.minimum(tl.div_rn(1.0, tl.where(sound, temperature, 1.0)), LARGEST)
    return scale, sound


@triton.jit
def length_of(draft_lengths, row, drafts, HAS_LENGTHS: tl.constexpr):
    """How many drafts a row has, and whether that is in range."""
    length = drafts
    sound = row >= 0
    if HAS_LENGTHS:
        given = tl.load(draft_lengths + row)
        sound = (given >= 0) & (given <= drafts)
        length = tl.where(sound, given, 0).to(tl.int32)
    return length, sound


@triton.jit
def row_of(
    source, target, draft, draft_lengths, drafts, sources, target_batch_stride, target_stride, draft_batch_stride,
    draft_stride, HAS_DRAFT: tl.constexpr, HAS_LENGTHS: tl.constexpr,
):  # fmt: skip
    """Row `source` of all logits, the target's K + 1 of a sequence before the draft's K: its sequence, where it begins,
    and whether it is one of those that may be looked at."""
    row = source // sources
    position = source % sources
    length, _ = length_of(draft_lengths, row, drafts, HAS_LENGTHS)
    of_target = position <= drafts
    begin = target + row.to(tl.int64) * target_batch_stride + position.to(tl.int64) * target_stride
    wanted = position <= length
    if HAS_DRAFT:
        index = tl.where(of_target, position, position - drafts - 1)
        other = draft + row.to(tl.int64) * draft_batch_stride + index.to(tl.int64) * draft_stride
        begin = tl.where(of_target, begin, other)
        wanted = index < length + of_target.to(tl.int32)
    return row, begin, wanted


@triton.jit
def merged(partials, source, splits, scale, SPLITS: tl.constexpr):
    """The largest logit of a row, and the sum of e^z relative to it, from those of its parts in their order."""
    split = tl.arange(0, SPLITS)
    place = partials + source * (2 * splits) + split
    x = tl.load(place, mask=split < splits, other=LOWEST)
    total = tl.load(place + splits, mask=split < splits, other=0.0)
    top = tl.max(x, axis=0)
    return top, tl.sum(total * tl.exp2((x - top) * scale * LOG2E), axis=0)


@triton.jit
def is_sound(total):
    """Whether a row with this sum has a softmax. False for NaN, and for a row of nothing but -inf."""
    return (total > 0.0) & (total < float("inf"))


@triton.jit
def softmax_of(partials, masses, thresholds, source, splits, scale, FILTERED: tl.constexpr, SPLITS: tl.constexpr):
    """Of a row: its largest logit, the sum of e^z, that of the logits that the filters keep, and the least of those."""
    top, total = merged(partials, source, splits, scale, SPLITS)
    mass = total
    threshold = float("-inf")
    if FILTERED:
        mass = tl.load(masses + source)
        threshold = tl.load(thresholds + source)
    return top, total, mass, threshold


@triton.jit
def log_prob(x, top, scale, mass, threshold):
    """One rounding in the product of both rows, in whatever order the compiler sees them: equal rows stay equal."""
    value = tl.fma(x - top, scale, -tl.log(mass))
    return tl.where(x >= threshold, value, float("-inf"))


@triton.jit
def words(seed, place, block, STREAM: tl.constexpr):
    """Four random words of each block, at a place in the sequence."""
    low = (place & 0xFFFFFFFF).to(tl.uint32)
    high = ((place >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(seed, block.to(tl.uint32), low * 0 + STREAM, low, high)


@triton.jit
def uniform(seed, offset, draft):
    """In [0, 1): decides on a draft of the call that begins at place `offset`."""
    first, _, _, _ = words(seed, offset, draft, ACCEPTANCE)
    return (first >> 8).to(tl.float32) * (2.0**-24)


@triton.jit
def interleaved(a, b, c, d):
    """[N, 4] of four [N]."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (a.shape[0], 4))


@triton.jit
def random_words(seed, place, start, SLOTS: tl.constexpr, WIDTH: tl.constexpr):
    """[SLOTS, WIDTH]: the words of the tokens of a tile of neighbours that begins at `start`, a multiple of 4."""
    block = start // 4 + tl.arange(0, SLOTS) * (WIDTH // 4)
    a, b, c, d = words(seed, place, block, RACE)
    if WIDTH == 4:
        found = interleaved(a, b, c, d)
    else:
        e, f, g, h = words(seed, place, block + 1, RACE)
        even = tl.join(tl.join(a, e), tl.join(c, g))
        odd = tl.join(tl.join(b, f), tl.join(d, h))
        found = tl.reshape(tl.join(even, odd), (SLOTS, 8))
    return found


@triton.jit
def below_one(word):
    """y = (word + 1/2) / 2^32, not cut."""
    return (word.to(tl.float32) + 0.5) * UNIT


@triton.jit
def exponentials(word):
    """-log(1 - y), y = (word + 1/2) / 2^32 but at most 1 - 2^-24, to a few units in the last place everywhere.

    Near y = 0 as a series. Else 1 - y is formed from the complement of the word, of which nothing cancels.
    """
    y = below_one(word)
    series = y * (1.0 / 7.0) + 1.0 / 6.0
    series = series * y + 0.2
    series = series * y + 0.25
    series = series * y + 1.0 / 3.0
    series = series * y + 0.5
    series = series * y * y + y
    rest = tl.maximum(((word ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * UNIT, 2.0**-24)
    return tl.where(y < 0.0625, series, -tl.log(rest))
