"""Cases of token_log_probs. Each combination of options and dtype is a pair of Triton kernels to compile: about 30."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import grpo_kernels
from grpo_kernels.testing.verification.case import (
    BFLOAT16,
    EVERY_DTYPE,
    FLOAT32,
    FLOAT64,
    Case,
    Inputs,
    Outputs,
    gradients,
    leaf,
)

_EVERY = ("entropy", "sum_squared_probs", "top1_ids")
_INF, _NAN = float("inf"), float("nan")
_TRAINING = (FLOAT32, BFLOAT16, FLOAT64)
Spoil = Callable[[Inputs], None]


def _make(
    generator: torch.Generator, rows: int, vocab: int, spread: float, inputs: dict[str, Any], spoil: Spoil | None
) -> Inputs:
    """Normal logits. In every row one stands out above and one below, so that rounding cannot change the top one."""
    logits = torch.randn(rows, vocab, generator=generator) * spread
    if vocab > 2:
        top, bottom = logits.max(-1, keepdim=True), logits.min(-1, keepdim=True)
        logits.scatter_(-1, top.indices, top.values + 1).scatter_(-1, bottom.indices, bottom.values - 1)
    made = {"logits": logits, "token_ids": torch.randint(vocab, (rows,), generator=generator)}
    if inputs.get("temperature") == "per row":
        made["temperature"] = torch.rand(rows, generator=generator) + 0.5
    elif "temperature" in inputs:
        made["temperature"] = torch.tensor(inputs["temperature"])
    if "mask" in inputs:
        made["mask"] = (torch.rand(rows, generator=generator) < 0.7).to(inputs["mask"])
    if spoil is not None:
        spoil(made)
    return made


def _run(options: dict[str, Any], inputs: Inputs) -> Outputs:
    logits = leaf(inputs["logits"])
    result = grpo_kernels.token_log_probs(**{**inputs, "logits": logits}, **options)
    return gradients(_given(result), {"logits": logits})


def _run_in_place(options: dict[str, Any], inputs: Inputs) -> Outputs:
    logits = leaf(inputs["logits"])
    result = grpo_kernels.token_log_probs(
        **{**inputs, "logits": logits.clone()}, outputs=_EVERY, inplace_backward=True, **options
    )
    return gradients(_given(result), {"logits": logits})


def _run_shifted(options: dict[str, Any], inputs: Inputs) -> Outputs:
    """As trainers slice: the logits at position t predict the token at t + 1."""
    logits = leaf(inputs["logits"])
    vocab = logits.shape[-1]
    view, ids = logits.view(4, -1, vocab)[:, :-1], inputs["token_ids"].int().view(4, -1)[:, 1:]
    return gradients(_given(grpo_kernels.token_log_probs(view, ids, outputs=_EVERY, **options)), {"logits": logits})


def _given(result: grpo_kernels.TokenLogProbsOutput) -> dict[str, Tensor]:
    return {name: value for name, value in result._asdict().items() if value is not None}


# --- what may stand in the inputs ------------------------------------------------------------------------------------


def _ignored_ids(inputs: Inputs) -> None:
    """Masked rows: ids that mean nothing, and NaN or infinities in the logits behind them."""
    logits, ids = inputs["logits"], inputs["token_ids"]
    ids[2::9] = -100
    logits[2::9] = _NAN
    ids[11], logits[11] = -1, _INF


def _behind_mask(inputs: Inputs) -> None:
    _ignored_ids(inputs)
    dead = inputs["mask"] == 0
    inputs["logits"][dead] = _NAN
    inputs["token_ids"][dead] = 2**40
    if inputs["temperature"].ndim == 1:
        inputs["temperature"][dead] = 0.0


def _impossible_tokens(inputs: Inputs) -> None:
    """-inf: half of a row, the first blocks, everything but the chosen token, and chosen tokens."""
    logits, ids = inputs["logits"], inputs["token_ids"]
    vocab = logits.shape[-1]
    logits[0, : vocab // 2] = -_INF
    logits[1, : vocab - 100] = -_INF
    logits[2, torch.arange(vocab) != 7] = -_INF
    logits[3::8, 1::2] = -_INF
    logits[5, 9] = -_INF
    logits[6, :4096] = -_INF
    ids[:3] = torch.tensor([vocab - 1, vocab - 2, 7])
    ids[3::8] = 10
    ids[5:7] = torch.tensor([9, 4000])


def _broken_rows(inputs: Inputs) -> None:
    logits = inputs["logits"]
    logits[1, -1] = _NAN
    logits[4, 10] = _INF
    logits[7] = -_INF


def _ties(inputs: Inputs) -> None:
    inputs["logits"].round_()


def _no_rows(inputs: Inputs) -> None:
    inputs.update({name: value[:0] for name, value in inputs.items()})


def _case(
    name: str,
    vocab: int,
    dtypes: tuple[torch.dtype, ...] = (FLOAT32, FLOAT64),
    *,
    rows: int | None = None,
    spread: float = 3.0,
    inputs: dict[str, Any] | None = None,
    spoil: Spoil | None = None,
    run: Callable[[dict[str, Any], Inputs], Outputs] = _run,
    **options: Any,
) -> Case:
    rows = rows or max(32, min(128, 131072 // vocab))  # of a handful eager may hit the float64 value by luck
    make = functools.partial(_make, rows=rows, vocab=vocab, spread=spread, inputs=inputs or {}, spoil=spoil)
    return Case("token_log_probs", f"{name}, V={vocab}", make, functools.partial(run, options), dtypes)


_EVERYTHING: dict[str, Any] = {"softcap": 6.0, "logit_scale": -1.3, "outputs": _EVERY}

CASES = [
    _case("log-probs alone", 1024, EVERY_DTYPE),
    _case("entropy", 5003, EVERY_DTYPE, outputs=("entropy",), temperature=0.7),
    _case("every output", 513, EVERY_DTYPE, outputs=_EVERY, logit_scale=1.1),
    _case(
        "everything, masked",
        5003,
        EVERY_DTYPE,
        inputs={"temperature": "per row", "mask": torch.bool},
        spoil=_behind_mask,
        **_EVERYTHING,
    ),
    _case("real vocabulary", 151936, _TRAINING, rows=8, outputs=("entropy",), temperature=0.7),
    _case("impossible tokens", 9000, _TRAINING, spoil=_impossible_tokens, outputs=_EVERY),
    _case("temperature tensor", 1000, _TRAINING, inputs={"temperature": 0.6}, outputs=("entropy",)),
    _case("softcap", 4096, _TRAINING, softcap=20.0, temperature=0.7, logit_scale=1.1, outputs=_EVERY),
    _case("in place", 1031, _TRAINING, run=_run_in_place, spoil=_ignored_ids),
    _case("shifted view, int32 ids", 1000, _TRAINING, run=_run_shifted),
    _case("number mask", 257, inputs={"temperature": 1.3, "mask": torch.float32}, spoil=_behind_mask),
    _case("peaked rows", 5003, _TRAINING, spread=30.0, outputs=_EVERY),
    _case("flat rows", 5003, spread=0.01, outputs=_EVERY),
    _case("two tokens", 2, outputs=_EVERY),
    _case("ties", 5003, _TRAINING, spread=1.0, spoil=_ties, outputs=_EVERY),
    _case("impossible tokens under a softcap", 9000, spoil=_impossible_tokens, softcap=6.0, outputs=_EVERY),
    _case("NaN and infinite rows", 5003, _TRAINING, spoil=_broken_rows, outputs=_EVERY),
    _case("NaN and infinite rows under a softcap", 5003, spoil=_broken_rows, softcap=6.0, outputs=_EVERY),
    _case("no rows", 5003, spoil=_no_rows, outputs=_EVERY),
]
