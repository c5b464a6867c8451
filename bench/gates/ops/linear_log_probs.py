"""Gates of the Triton kernels of linear_log_probs."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from bench.gates.gate import WIDE_STORES, Gate, Instructions
from bench.gates.triton_kernels import Specialisation, TritonKernels

_BOTH = frozenset({False, True})
_FLAGS = {"TEMPERATURE": frozenset({0, 1, 2}), "ENTROPY": _BOTH}
_TILES = {
    "TMA": _BOTH,
    "HAS_BIAS": _BOTH,
    "PARTS": frozenset({0, 1, 3}),
    "CAPPED": _BOTH,
    "PRECISION": frozenset({"ieee", "tf32x3"}),
    "BLOCK_M": frozenset({128}),
    "BLOCK_N": frozenset({64, 128, 256}),
    "BLOCK_K": frozenset({16, 32, 64}),
    "BLOCK_R": frozenset({16}),
    "PIECES": frozenset({2, 4, 8}),
}
_OUTPUTS = {"HAS_MASK": _BOTH, "SQUARED": _BOTH, "TOP1": _BOTH}


class Case(NamedTuple):
    """A head, what is asked of it, and what its code depends on."""

    width: int = 4096  # H: 4104 is a multiple of 8, 4095 of nothing
    vocab: int = 128256
    dtype: str = "bfloat16"
    ids: str = "int64"
    rank: int = 0
    bias: bool = False
    mask: bool = True
    temperature: int = 0  # 0 a number, 1 a 0-d tensor, 2 one a row
    capped: bool = False
    entropy: bool = True
    squared: bool = False
    top1: bool = False
    statistics: bool = True
    upstream: str = "log_probs"  # or "log_sum_exp" or "both"


_VALUES: dict[str, tuple[Any, ...]] = {
    "width": (4096, 4104, 4095),
    "vocab": (128256, 32003),
    "dtype": ("bfloat16", "float16", "float32"),
    "ids": ("int64", "int32"),
    "rank": (0, 8, 64),
    "bias": (False, True),
    "mask": (True, False),
    "temperature": (0, 1, 2),
    "capped": (False, True),
    "entropy": (True, False),
    "squared": (False, True),
    "top1": (False, True),
    "upstream": ("log_probs", "both", "log_sum_exp"),
}
_EVERYTHING = {
    "rank": 64,
    "bias": True,
    "temperature": 2,
    "capped": True,
    "squared": True,
    "top1": True,
    "upstream": "both",
}


def pairwise(values: Mapping[str, tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """A few combinations in which every two values of different names meet."""
    open_pairs = {((a, x), (b, y)) for a, b in itertools.combinations(values, 2) for x in values[a] for y in values[b]}
    while open_pairs:
        chosen = dict(min(open_pairs, key=str))
        for name in values:
            if name not in chosen:
                chosen[name] = max(values[name], key=lambda v: len(_met({**chosen, name: v}, values) & open_pairs))
        open_pairs -= _met(chosen, values)
        yield chosen


def _met(chosen: Mapping[str, Any], values: Mapping[str, tuple[Any, ...]]) -> set[Any]:
    return set(itertools.combinations([(name, chosen[name]) for name in values if name in chosen], 2))


def _cases() -> Iterator[Case]:
    yield Case()
    for width, dtype in itertools.product(_VALUES["width"], _VALUES["dtype"]):
        yield Case(width, dtype=dtype, **_EVERYTHING)
    for bias, capped, rank in itertools.product((False, True), (False, True), (0, 64)):
        yield Case(bias=bias, capped=capped, rank=rank, temperature=2, squared=True, top1=True)
    for chosen in pairwise(_VALUES):
        yield Case(**chosen)
    yield Case(statistics=False)


def _few() -> Iterator[Case]:
    yield Case()
    yield Case(4095, dtype="float32", **_EVERYTHING)


def _launch(case: Case) -> None:
    import torch

    from grpo_kernels.linear_log_probs import _triton

    dtype = getattr(torch, case.dtype)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    rows = 1000
    lora = bool(case.rank)
    temperatures = (None, empty(), empty(rows))
    options = (
        empty(rows, case.width, dtype=dtype),
        empty(case.vocab, case.width, dtype=dtype),
        empty(case.vocab, dtype=dtype) if case.bias else None,
        empty(case.rank, case.width, dtype=dtype) if lora else None,
        empty(case.vocab, case.rank, dtype=dtype) if lora else None,
        2.0,
        empty(rows, dtype=getattr(torch, case.ids)),
        empty(rows, dtype=torch.bool) if case.mask else None,
        temperatures[case.temperature],
        1.0,
        1.0,
        30.0 if case.capped else 0.0,
    )
    forward, backward = (
        inspect.unwrap(f) for f in (_triton.linear_token_log_probs, _triton.linear_token_log_probs_backward)
    )
    outputs = forward(*options, case.entropy, case.squared, case.top1, case.statistics)
    if not case.statistics:
        return
    backward(
        *options,
        outputs[4],
        empty(rows) if case.upstream != "log_sum_exp" else None,
        empty(rows) if case.entropy else None,
        empty(rows) if case.upstream != "log_probs" else None,
        None,
        True,
        True,
        case.bias,
        lora,
        dtype,
        dtype,
    )


def launch(quick: bool) -> None:
    for case in _few() if quick else _cases():
        _launch(case)


_ASYNCHRONOUS = (
    Instructions("HGMMA or UTCMMA", r"(HGMMA|UTC\w*MMA)\b.*", at_least=1),
    Instructions("UTMALDG", r"UTMALDG\b.*", at_least=1),
)
_OTHER = (Instructions("MMA", r"(HMMA|HGMMA|UTC\w*MMA)\b.*", at_least=1),)
_WIDE_COPIES = Instructions("LDGSTS.128", r"LDGSTS\..*\b128\b.*", at_least=1)


def gate(of: Specialisation) -> Gate:
    """The products have as many registers as there are; what counts is that they keep their sums in them."""
    if of.kernel == "merge_kernel":
        return Gate(of.kernel, 128, of.warps * 32, 4096)
    tma = of.constant("TMA")
    wide = not tma and of.aligned("hidden_stride", "weight_stride", "width")
    instructions = _ASYNCHRONOUS if tma else (*_OTHER, _WIDE_COPIES) if wide else _OTHER
    if of.kernel == "dlogits_kernel":
        instructions = (*instructions, WIDE_STORES)
    variant = "TMA" if tma else "16-byte loads" if wide else "narrow loads"
    return Gate(of.kernel, 255, of.warps * 32, 200 * 1024 if tma else 100 * 1024, instructions, variant)


TRITON = TritonKernels(
    launch,
    gate,
    {
        "forward_kernel": {**_FLAGS, **_TILES, **_OUTPUTS},
        "dlogits_kernel": {**_FLAGS, **_TILES, "LOG_PROBS": _BOTH, "LOG_SUM_EXP": _BOTH},
        "merge_kernel": {
            **_FLAGS,
            **_OUTPUTS,
            "STATISTICS": _BOTH,
            "SPLITS": frozenset({128}),
            "ROWS": frozenset({4}),
        },
    },
)
