"""Gates of the Triton kernels of token_log_probs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from bench.gates.gate import NO_BARRIER, WIDE_LOADS, WIDE_STORES, Gate, Instructions
from bench.gates.triton_kernels import Specialisation, TritonKernels

_BOTH = frozenset({False, True})
_SHAPE = {"SLOTS": frozenset({32, 64, 128, 256, 512}), "WIDTH": frozenset({4, 8}), "NEIGHBOURS": _BOTH}
_SHARED_FLAGS = {"HAS_MASK": _BOTH, "TEMPERATURE": frozenset({0, 1, 2}), "CAPPED": _BOTH, "ENTROPY": _BOTH}


class Flags(NamedTuple):
    """What the code depends on, beside the shape and the dtypes."""

    mask: bool = False
    temperature: int = 0  # 0 a number, 1 a 0-d tensor, 2 one a row
    capped: bool = False
    entropy: bool = False
    squared: bool = False
    top1: bool = False
    statistics: bool = True  # for a backward
    log_sum_exp: bool = False  # whether the backward has a gradient of it


class Rows(NamedTuple):
    """Logits of shape [2, length, vocab], cut from a buffer of width `padded` that begins at element `offset`."""

    vocab: int
    dtype: str = "bfloat16"
    ids: str = "int64"
    padded: int = 0
    offset: int = 0
    sliced: bool = False  # logits[:, :-1]
    length: int = 3
    grad: str = ""  # dtype of the gradient, if not that of the logits


TRAINING = Flags(mask=True, entropy=True)
EVERYTHING = Flags(True, 2, True, True, True, True, True, True)
Z_LOSS = Flags(entropy=True, log_sum_exp=True)
DTYPES = ("bfloat16", "float16", "float32")
VOCABS = (32000, 50257, 1, 100, 256, 512, 1000, 1024, 2048)  # every number of slots; aligned rows, and ragged ones
LAYOUTS = (
    Rows(50257, padded=50304),
    Rows(32000, offset=1),
    Rows(32000, sliced=True),
    Rows(151936, sliced=True, length=40000),  # strides beyond 2^31
)


def _combinations() -> Iterator[tuple[Rows, Flags]]:
    on_or_off = (False, True)
    for mask, temperature, *others in itertools.product(on_or_off, (0, 1, 2), *[on_or_off] * 5):
        for log_sum_exp in on_or_off[: 1 + bool(others[-1])]:
            yield Rows(32000), Flags(bool(mask), temperature, *map(bool, others), log_sum_exp)
            if mask and temperature == 2:  # prologue of a program: the rows make no difference to it
                yield Rows(50257), Flags(True, 2, *map(bool, others), log_sum_exp)
    for dtype, vocab in itertools.product(DTYPES, VOCABS):
        yield Rows(vocab, dtype), TRAINING
    for dtype, vocab, ids in itertools.product(DTYPES, (32000, 50257), ("int32", "int64")):
        yield Rows(vocab, dtype, ids), TRAINING
        yield Rows(vocab, dtype, ids), EVERYTHING
    yield from itertools.product(LAYOUTS, (TRAINING, EVERYTHING))
    for dtype, vocab in itertools.product(("bfloat16", "float16"), VOCABS):
        yield Rows(vocab, "float32", grad=dtype), TRAINING
    for dtype, vocab in itertools.product(("bfloat16", "float16"), (32000, 50257)):
        yield Rows(vocab, "float32", grad=dtype), Z_LOSS
        yield Rows(vocab, "float32", grad=dtype), EVERYTHING


def _few() -> Iterator[tuple[Rows, Flags]]:
    yield Rows(32000), TRAINING
    yield Rows(32000, "float32"), TRAINING
    yield Rows(32000, ids="int32"), EVERYTHING
    yield Rows(50257, "float16"), TRAINING
    yield Rows(100), TRAINING
    yield Rows(32000, "float32", grad="bfloat16"), Z_LOSS
    yield Rows(50257, "float32", grad="bfloat16"), EVERYTHING


def _launch(rows: Rows, flags: Flags) -> None:
    import torch

    from grpo_kernels.token_log_probs import _triton

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    width = rows.padded or rows.vocab
    flat = empty(2 * rows.length * width + rows.offset, dtype=getattr(torch, rows.dtype))
    logits = flat[rows.offset :].view(2, rows.length, width)[..., : rows.vocab]
    if rows.sliced:
        logits = logits[:, :-1]
    leading = logits.shape[:-1]
    temperatures = (None, empty(dtype=torch.float32), empty(*leading, dtype=torch.float32))
    options = (
        empty(*leading, dtype=getattr(torch, rows.ids)),
        empty(*leading, dtype=torch.bool) if flags.mask else None,
        temperatures[flags.temperature],
        1.0,
        1.0,
        30.0 if flags.capped else 0.0,
    )
    outputs = _triton.token_log_probs(logits, *options, flags.entropy, flags.squared, flags.top1, flags.statistics)
    if not flags.statistics:
        return
    upstream = empty(*leading, dtype=torch.float32)
    entropy, log_sum_exp = upstream if flags.entropy else None, upstream if flags.log_sum_exp else None
    arguments = (*options, outputs[4], upstream, entropy, log_sum_exp)
    _triton.token_log_probs_backward(logits, *arguments, getattr(torch, rows.grad) if rows.grad else None)
    _triton.token_log_probs_backward_(logits, *arguments)


def launch(quick: bool) -> None:
    for rows, flags in _few() if quick else _combinations():
        _launch(rows, flags)


_BARRIERS = r"BAR\..*"
_HALF_AS_WIDE_STORES = Instructions("STG.64", r"STG\..*\b64\b.*", at_least=1)  # half of 16 bytes


def gate(of: Specialisation) -> Gate:
    """What a specialisation may cost depends on how its rows lie, and on what it computes."""
    backward = of.kernel == "backward_kernel"
    wide = [WIDE_LOADS] if of.constant("NEIGHBOURS") else []
    types = {name: kind for name, kind, _ in of.arguments}
    narrower = backward and types["logits"] == "*fp32" != types["grad_logits"]
    if wide and backward:
        wide.append(_HALF_AS_WIDE_STORES if narrower else WIDE_STORES)
    # The slots of the forward merge after its loop: up to three barriers for each of its sums, none inside the loop.
    more = not backward and (of.constant("SQUARED") or of.constant("TOP1"))
    barriers = NO_BARRIER if backward else Instructions("BAR", _BARRIERS, at_most=17 if more else 8)
    variant = ("aligned rows" if of.constant("NEIGHBOURS") else "other rows") + ", 16-bit gradient" * narrower
    # Of 512 threads, two programs a multiprocessor.
    return Gate(of.kernel, 64, of.warps * 32, 0 if backward else 256, (*wide, barriers), variant)


TRITON = TritonKernels(
    launch,
    gate,
    {
        "forward_kernel": {**_SHARED_FLAGS, "SQUARED": _BOTH, "TOP1": _BOTH, "STATISTICS": _BOTH, **_SHAPE},
        "backward_kernel": {**_SHARED_FLAGS, "LOG_SUM_EXP": _BOTH, "BLOCKS": frozenset({4}), **_SHAPE},
    },
)
