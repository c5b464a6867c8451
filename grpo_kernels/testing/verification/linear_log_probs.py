"""Cases of linear_token_log_probs, and those of the losses on the same head.

On a GPU each combination of options and dtype is a set of Triton kernels to compile, so the shapes vary and the
combinations are few.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import grpo_kernels
from grpo_kernels.testing.verification import linear_losses
from grpo_kernels.testing.verification.case import EVERY_DTYPE, FLOAT32, Case, Inputs, Outputs, gradients
from grpo_kernels.testing.verification.linear_head import (
    EXACT,
    TRAINING,
    WIDTH,
    Change,
    Run,
    accumulated,
    call,
    head,
    leaves_of,
)

_EVERY = ("entropy", "sum_squared_probs", "top1_ids")
_ROWS, _VOCAB = 48, 517


def _make_rows(
    generator: torch.Generator,
    rows: int,
    width: int,
    vocab: int,
    spread: float,
    optional: str,
    spoil: Change | None,
) -> Inputs:
    made = head(generator, (rows,), width, vocab, spread, optional)
    made["token_ids"] = torch.randint(vocab, (rows,), generator=generator)
    if "per row" in optional:
        made["temperature"] = torch.rand(rows, generator=generator) + 0.5
    if "mask" in optional:
        made["mask"] = torch.rand(rows, generator=generator) < 0.7
    if spoil is not None:
        spoil(made)
    return made


def _log_probs(inputs: Inputs, options: Mapping[str, Any]) -> dict[str, Tensor]:
    result = call(grpo_kernels.linear_token_log_probs, inputs, options)
    return {name: value for name, value in result._asdict().items() if value is not None}


def _run_rows(inputs: Inputs, options: Mapping[str, Any], frozen: tuple[str, ...]) -> Outputs:
    leaves = leaves_of(inputs, frozen)
    return gradients(_log_probs({**inputs, **leaves}, options), leaves)


def _run_rows_accumulated(inputs: Inputs, options: Mapping[str, Any], frozen: tuple[str, ...]) -> Outputs:
    return accumulated("linear_token_log_probs", inputs, lambda given, more: _log_probs(given, {**options, **more}))


def _run_shifted(inputs: Inputs, options: Mapping[str, Any], frozen: tuple[str, ...]) -> Outputs:
    """As trainers slice: the state at position t predicts the token at t + 1; ids of 32 bits."""
    leaves = leaves_of(inputs, frozen)
    states = leaves["hidden"].view(4, -1, leaves["hidden"].shape[-1])[:, :-1]
    ids = inputs["token_ids"].int().view(4, -1)[:, 1:]
    return gradients(_log_probs({**inputs, **leaves, "hidden": states, "token_ids": ids}, options), leaves)


def _ignored_ids(inputs: Inputs) -> None:
    """Masked rows: ids that mean nothing, and NaN or infinities in the states behind them."""
    inputs["token_ids"][2::9] = -100
    inputs["hidden"][2::9] = math.nan
    inputs["token_ids"][11], inputs["hidden"][11] = -1, math.inf


def _behind_mask(inputs: Inputs) -> None:
    _ignored_ids(inputs)
    dead = ~inputs["mask"]
    inputs["token_ids"][dead] = 2**31 - 1
    inputs["hidden"][dead] = math.nan
    if "temperature" in inputs:
        inputs["temperature"][dead] = 0.0


def _broken_rows(inputs: Inputs) -> None:
    inputs["hidden"][1, -1] = math.nan
    inputs["hidden"][4] = math.inf


def _impossible_tokens(inputs: Inputs) -> None:
    """-inf in the bias: a token out of the vocabulary, among them the first and the last, and a chosen one."""
    inputs["bias"][1::3] = -math.inf
    inputs["bias"][:66] = -math.inf
    inputs["bias"][-130:-1] = -math.inf
    inputs["token_ids"][:-1] = 66
    inputs["token_ids"][-1] = 0


def _offset(inputs: Inputs) -> None:
    """A large number on all logits: the log-probs have to be formed from differences of logits.

    In float64 the definition is no oracle of it: the logits themselves are rounded to 1e-13 there.
    """
    inputs["bias"] += 1024.0


def _low(inputs: Inputs) -> None:
    inputs["bias"] -= 200.0


def _certain(inputs: Inputs) -> None:
    """Each row's token is its likeliest by far: gradients that nearly cancel."""
    inputs["hidden"][:] = inputs["weight"][inputs["token_ids"]] * 3.0


def _temperature(inputs: Inputs) -> None:
    inputs["temperature"] = torch.tensor(0.6)


def _no_rows(inputs: Inputs) -> None:
    inputs.update({name: inputs[name][:0] for name in ("hidden", "token_ids")})


def _rows(
    name: str,
    dtypes: tuple[torch.dtype, ...] = EXACT,
    *,
    rows: int = _ROWS,
    width: int = WIDTH,
    vocab: int = _VOCAB,
    spread: float = 3.0,
    optional: str = "",
    spoil: Change | None = None,
    frozen: tuple[str, ...] = (),
    run: Run = _run_rows,
    **options: Any,
) -> Case:
    make = functools.partial(
        _make_rows, rows=rows, width=width, vocab=vocab, spread=spread, optional=optional, spoil=spoil
    )
    runs = functools.partial(run, options=options, frozen=frozen)
    return Case("linear_token_log_probs", f"{name}, H={width} V={vocab}", make, runs, dtypes)


_EVERYTHING: dict[str, Any] = {"softcap": 6.0, "logit_scale": -1.3, "outputs": _EVERY}
_LOG_PROBS = [
    _rows("log-probs alone", EVERY_DTYPE),
    _rows("entropy", EVERY_DTYPE, width=64, vocab=1031, outputs=("entropy",), temperature=0.7),
    _rows("everything, masked", EVERY_DTYPE, optional="bias, lora, mask, per row", spoil=_behind_mask, **_EVERYTHING),
    _rows("lora alone", TRAINING, optional="lora", frozen=("hidden", "weight"), outputs=("entropy",)),
    _rows("accumulator", TRAINING, optional="bias", spoil=_ignored_ids, run=_run_rows_accumulated),
    _rows("bias", TRAINING, optional="bias", outputs=("entropy",)),
    _rows("softcap", TRAINING, softcap=5.0, logit_scale=1.1, outputs=("entropy",)),
    _rows("ragged sizes", TRAINING, rows=67, width=37, vocab=131, outputs=_EVERY),
    _rows("more rows than a tile", TRAINING, rows=301, width=40, vocab=300, outputs=("entropy",)),
    _rows("real vocabulary", TRAINING, rows=16, width=16, vocab=151936, outputs=("entropy",)),
    _rows("shifted view, int32 ids", TRAINING, run=_run_shifted, outputs=_EVERY),
    _rows("temperature tensor", spoil=_temperature, outputs=("entropy",)),
    _rows("frozen states", frozen=("hidden",), optional="bias"),
    _rows("frozen weight", frozen=("weight",), optional="bias, lora"),
    _rows("impossible tokens", TRAINING, optional="bias", spoil=_impossible_tokens, outputs=_EVERY),
    _rows("NaN and infinite rows", TRAINING, spoil=_broken_rows, outputs=_EVERY),
    _rows("offset logits", (FLOAT32,), optional="bias", spoil=_offset, outputs=("entropy",)),
    _rows("low logits", TRAINING, optional="bias", spoil=_low, outputs=_EVERY),
    _rows("peaked rows", TRAINING, spread=40.0, outputs=_EVERY),
    _rows("certain tokens", (FLOAT32,), spoil=_certain),
    _rows("two tokens", vocab=2, outputs=_EVERY),
    _rows("no rows", optional="bias, lora", spoil=_no_rows, outputs=_EVERY),
]


CASES = [*_LOG_PROBS, *linear_losses.CASES]
