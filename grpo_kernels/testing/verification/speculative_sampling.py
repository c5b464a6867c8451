"""Cases of verify_draft. Tokens must be those of float64: no case stands on the edge of a decision."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

import grpo_kernels
from grpo_kernels.testing.verification.case import BFLOAT16, EVERY_DTYPE, FLOAT32, FLOAT64, Case, Inputs, Outputs

_INF, _NAN = float("inf"), float("nan")
_TRAINING = (FLOAT32, BFLOAT16, FLOAT64)
Spoil = Callable[[Inputs], None]


def _make(
    generator: torch.Generator,
    rows: int,
    drafts: int,
    vocab: int,
    far: float,
    spread: float,
    certain: bool,
    numbers: tuple[str, ...],
    spoil: Spoil | None,
) -> Inputs:
    """Logits of target and draft, `far` apart; drafts that the draft has drawn, or its likeliest tokens."""
    target = torch.randn(rows, drafts + 1, vocab, generator=generator) * spread
    draft = target[:, :drafts] + torch.randn(rows, drafts, vocab, generator=generator) * far
    made: Inputs = {"target_logits": target}
    if certain or not drafts:
        made["draft_ids"] = draft.argmax(-1)
    else:
        probs = draft.softmax(-1).flatten(0, 1)
        made["draft_ids"] = torch.multinomial(probs, 1, generator=generator).view(rows, drafts)
        made["draft_logits"] = draft
    made["seeds"] = torch.randint(-(2**62), 2**62, (rows,), generator=generator)
    offered = {
        "temperature": torch.rand(rows, generator=generator) + 0.5,
        "top_k": torch.randint(-1, vocab + 2, (rows,), generator=generator),
        "top_p": torch.rand(rows, generator=generator) * 0.9 + 0.05,
        "draft_lengths": torch.randint(drafts + 1, (rows,), generator=generator),
        "offsets": torch.randint(2**40, (rows,), generator=generator),
    }
    made.update({name: offered[name] for name in numbers})
    if spoil is not None:
        spoil(made)
    return made


def _run(options: dict[str, Any], inputs: Inputs) -> Outputs:
    return grpo_kernels.verify_draft(**inputs, **options)._asdict()


def _run_views(options: dict[str, Any], inputs: Inputs) -> Outputs:
    """One row of logits for every position of every sequence, and int32 ids."""
    target, ids = inputs["target_logits"], inputs["draft_ids"].int()
    shared = target[:1, :1].expand(target.shape)
    others = {name: value for name, value in inputs.items() if name not in ("target_logits", "draft_ids")}
    if "draft_logits" in others:
        others["draft_logits"] = others["draft_logits"][:1, :1].expand(others["draft_logits"].shape)
    return grpo_kernels.verify_draft(shared, ids, **others, **options)._asdict()


# --- what may stand in the inputs ------------------------------------------------------------------------------------


def _impossible_tokens(inputs: Inputs) -> None:
    """-inf: every second token of some, the first blocks of others, all but one token, a drafted token."""
    target, vocab = inputs["target_logits"], inputs["target_logits"].shape[-1]
    target[::5, :, 1::2] = -_INF
    target[1::5, :, : vocab * 3 // 4] = -_INF
    target[2, :, 1:] = -_INF
    target[3, 0, inputs["draft_ids"][3, 0]] = -_INF
    if "draft_logits" in inputs:
        inputs["draft_logits"][::3, :, ::2] = -_INF


def _broken_rows(inputs: Inputs) -> None:
    target = inputs["target_logits"]
    target[1, 0, -1] = _NAN
    target[4, 1, 10] = _INF
    target[7, 2] = -_INF
    target[8, -1, 0] = _NAN
    if "draft_logits" in inputs:
        inputs["draft_logits"][10, 1, 3] = _NAN
        inputs["draft_logits"][11, 0] = -_INF


def _behind_the_drafts(inputs: Inputs) -> None:
    """NaN and ids that mean nothing behind each row's drafts."""
    drafts = inputs["draft_ids"].shape[1]
    behind = torch.arange(drafts) >= inputs["draft_lengths"][:, None]
    inputs["draft_ids"][behind] = 2**40
    inputs["target_logits"][:, 1:][behind] = _NAN
    if "draft_logits" in inputs:
        inputs["draft_logits"][behind] = _INF


def _equal(inputs: Inputs) -> None:
    inputs["draft_logits"].copy_(inputs["target_logits"][:, :-1])


def _no_rows(inputs: Inputs) -> None:
    inputs.update({name: value[:0] for name, value in inputs.items()})


def _case(
    name: str,
    vocab: int,
    dtypes: tuple[torch.dtype, ...] = _TRAINING,
    *,
    rows: int = 24,
    drafts: int = 3,
    far: float = 0.7,
    spread: float = 2.0,
    certain: bool = False,
    numbers: tuple[str, ...] = (),
    spoil: Spoil | None = None,
    run: Callable[[dict[str, Any], Inputs], Outputs] = _run,
    **options: Any,
) -> Case:
    make = functools.partial(
        _make, rows=rows, drafts=drafts, vocab=vocab, far=far, spread=spread, certain=certain, numbers=numbers,
        spoil=spoil,
    )  # fmt: skip
    return Case("verify_draft", f"{name}, V={vocab}", make, functools.partial(run, options), dtypes)


_EVERY = ("temperature", "top_k", "top_p", "draft_lengths", "offsets")
_BLOCK: dict[str, Any] = {"mode": "block"}

CASES = [
    _case("token", 1024, EVERY_DTYPE),
    _case("block", 1024, EVERY_DTYPE, **_BLOCK),
    _case("greedy", 1024, EVERY_DTYPE, certain=True, far=0.3, mode="greedy"),
    _case("certain drafts", 1031, EVERY_DTYPE, certain=True),
    _case("certain drafts, block", 513, certain=True, **_BLOCK),
    _case("every filter", 3001, EVERY_DTYPE, numbers=_EVERY),
    _case("every filter, block", 3001, numbers=_EVERY, **_BLOCK),
    _case("every filter, certain drafts", 3001, certain=True, numbers=_EVERY),
    _case("top_k", 2049, top_k=50, numbers=("temperature",)),
    _case("top_p", 2049, top_p=0.95, numbers=("temperature",)),
    _case("top_p, block", 1000, top_p=0.8, **_BLOCK),
    _case("real vocabulary", 151936, rows=4, drafts=1, numbers=("temperature",)),
    _case("real vocabulary, block, filters", 151936, rows=4, drafts=2, top_k=100, top_p=0.9, **_BLOCK),
    _case("sampling", 3001, drafts=0, numbers=("temperature",)),
    _case("sampling, filters", 3001, drafts=0, top_k=20, top_p=0.9),
    _case("one draft", 300, drafts=1),
    _case("eight drafts", 777, drafts=8, far=0.1, numbers=("draft_lengths",)),
    _case("eight drafts, block", 777, drafts=8, far=0.1, numbers=("draft_lengths",), **_BLOCK),
    _case("equal distributions", 2048, spoil=_equal),
    _case("equal distributions, block", 2048, spoil=_equal, **_BLOCK),
    _case("few tokens", 3),
    _case("few tokens, block", 3, **_BLOCK),
    _case("one token", 1),
    _case("impossible tokens", 3000, spoil=_impossible_tokens),
    _case("impossible tokens, block", 3000, spoil=_impossible_tokens, top_p=0.9, **_BLOCK),
    _case("broken rows", 1500, far=0.1, spoil=_broken_rows),
    _case("broken rows, block", 1500, far=0.1, spoil=_broken_rows, **_BLOCK),
    _case("broken rows, greedy", 1500, certain=True, far=0.1, spoil=_broken_rows, mode="greedy"),
    _case("anything behind the drafts", 700, numbers=("draft_lengths",), spoil=_behind_the_drafts),
    _case("anything behind the drafts, block", 700, numbers=("draft_lengths",), spoil=_behind_the_drafts, **_BLOCK),
    _case("shared rows, int32 ids", 2000, run=_run_views),
    _case("peaked rows", 3001, spread=15.0),
    _case("no rows", 100, spoil=_no_rows),
]
