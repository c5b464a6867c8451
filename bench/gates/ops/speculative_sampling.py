"""Gates of the Triton kernels of speculative_sampling."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from bench.gates.gate import NO_BARRIER, WIDE_LOADS, Gate, Instructions
from bench.gates.triton_kernels import Specialisation, TritonKernels

_BOTH = frozenset({False, True})
_TENSORS = ("lengths", "temperatures", "top_k", "top_p", "offsets")


class Form(NamedTuple):
    """What the code depends on: how logits lie, and which tensors there are."""

    mode: str
    certain: bool = False  # no draft logits
    tensors: tuple[str, ...] = _TENSORS
    vocab: int = 32000
    dtype: str = "bfloat16"
    ids: str = "int64"
    stride: int = 0  # from sequence to sequence, if not a dense one


_MODES = ("token", "block", "greedy")
_DTYPES = ("bfloat16", "float16", "float32")
_SMALL = (1, 100, 300, 1000, 2048, 4096)  # with the others every number of slots


def _forms() -> Iterator[Form]:
    for mode, certain, tensors in itertools.product(_MODES, (False, True), ((), _TENSORS)):
        yield Form(mode, certain, tensors)
    for name in _TENSORS:
        yield Form("token", tensors=(name,))
    for dtype, vocab in itertools.product(_DTYPES, (32000, 50257)):
        yield Form("block", vocab=vocab, dtype=dtype)
    yield Form("token", dtype="float32")
    yield Form("greedy", vocab=50257)
    for vocab in _SMALL:
        yield Form("block", vocab=vocab)
    yield Form("block", ids="int32")
    yield Form("block", stride=3 << 30)  # beyond 2^31


def _few() -> Iterator[Form]:
    yield Form("token", tensors=())
    yield Form("block")
    yield Form("token", certain=True, tensors=("temperatures",), vocab=50257, dtype="float32")
    yield Form("greedy", tensors=())


def _launch(form: Form) -> None:
    import torch

    from grpo_kernels.speculative_sampling import _triton

    batch, drafts, dtype = 16, 3, getattr(torch, form.dtype)

    def logits(positions: int) -> torch.Tensor:
        strides = (form.stride or positions * form.vocab, form.vocab, 1)
        return torch.empty_strided((batch, positions, form.vocab), strides, dtype=dtype, device="meta")

    def row(name: str, kind: torch.dtype) -> torch.Tensor | None:
        return torch.empty(batch, dtype=kind, device="meta") if name in form.tensors else None

    real, whole = torch.float32, torch.int64
    _triton.verify_draft(
        logits(drafts + 1),
        torch.empty(batch, drafts, dtype=getattr(torch, form.ids), device="meta"),
        None if form.certain else logits(drafts),
        row("lengths", whole),
        row("temperatures", real),
        row("top_k", whole),
        row("top_p", real),
        torch.empty(batch, dtype=whole, device="meta"),
        row("offsets", whole),
        form.mode,
    )


def launch(quick: bool) -> None:
    for form in _few() if quick else _forms():
        _launch(form)


_WARP_ALONE = ("token_kernel", "chain_kernel", "block_kernel", "greedy_kernel")
# Up to three barriers for each of the reductions behind a loop: two, or one; four where the likeliest id is wanted.
_AFTER_THE_LOOP = Instructions("BAR", r"BAR\..*", at_most=12)
_LIMITS: dict[str, tuple[int, tuple[Instructions, ...]]] = {
    "statistics_kernel": (48, (_AFTER_THE_LOOP,)),
    "residual_kernel": (48, (_AFTER_THE_LOOP,)),
    "filter_kernel": (80, ()),
    "race_kernel": (80, (NO_BARRIER,)),
    "choose_kernel": (96, ()),
}


def gate(of: Specialisation) -> Gate:
    """Kernels that decide are a warp, as those that race: it needs no barrier. Kernels that read logits load 16 bytes a
    thread where rows are aligned; other rows of the race are exchanged, so that a thread has four tokens that share
    their noise."""
    if of.kernel in _WARP_ALONE:
        return Gate(of.kernel, 72, 32, 0, (NO_BARRIER,))
    registers, instructions = _LIMITS[of.kernel]
    if of.aligned("vocab", "target_batch_stride", "target_stride", "draft_batch_stride", "draft_stride"):
        return Gate(of.kernel, registers, of.warps * 32, 256, (WIDE_LOADS, *instructions), "aligned rows")
    shared = 8192 if of.kernel == "choose_kernel" else 256
    return Gate(of.kernel, max(registers, 72), of.warps * 32, shared, (), "other rows")


_COMMON = {"HAS_DRAFT": _BOTH, "HAS_LENGTHS": _BOTH, "HAS_TEMPERATURES": _BOTH}
_SPLITS = {"SPLITS": frozenset({32})}
_WIDTH = {"WIDTH": frozenset({4, 8})}
_TILE = {"SLOTS": frozenset({32, 64, 128, 256}), **_WIDTH}
_NEIGHBOURS = {"NEIGHBOURS": _BOTH}
_ROOM = {"ROOM": frozenset({0, 12288})}
_FILTERED = {"FILTERED": _BOTH}
_OFFSETS = {"HAS_OFFSETS": _BOTH}
_LENGTHS = {"HAS_LENGTHS": _BOTH, "HAS_TEMPERATURES": _BOTH}

TRITON = TritonKernels(
    launch,
    gate,
    {
        "statistics_kernel": {**_COMMON, "GREEDY": _BOTH, **_ROOM, **_TILE, **_NEIGHBOURS},
        "filter_kernel": {
            **_COMMON, "HAS_TOP_K": _BOTH, "HAS_TOP_P": _BOTH, "SHIFT": frozenset({0, 13, 16}), **_SPLITS,
            "GROUPS": frozenset({32, 64, 128, 256}), **_ROOM, "SLOTS": frozenset({32, 64, 128, 256, 512}), **_WIDTH,
            **_NEIGHBOURS,
        },
        "token_kernel": {**_COMMON, "HAS_TOP_P": _BOTH, **_OFFSETS, **_FILTERED, **_SPLITS},
        "greedy_kernel": {**_LENGTHS, **_SPLITS},
        "chain_kernel": {**_COMMON, "HAS_TOP_P": _BOTH, **_OFFSETS, **_FILTERED, **_SPLITS},
        "residual_kernel": {**_LENGTHS, **_FILTERED, **_SPLITS, **_TILE, **_NEIGHBOURS},
        "block_kernel": {**_COMMON, **_OFFSETS, **_FILTERED, **_SPLITS},
        "race_kernel": {
            "HAS_DRAFT": _BOTH, "HAS_TEMPERATURES": _BOTH, **_OFFSETS, **_FILTERED, "SLOTS": frozenset({32}), **_WIDTH,
        },
        "choose_kernel": {
            "HAS_TEMPERATURES": _BOTH, **_OFFSETS, **_FILTERED, "SPLITS": frozenset({256}), **_TILE,
        },
    },
)  # fmt: skip
