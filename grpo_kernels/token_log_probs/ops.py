"""Schemas of the log-prob kernels. Imports torch alone, so that they exist before anything is traced."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from grpo_kernels import _dispatch

_PACKAGE = "grpo_kernels.token_log_probs"

_dispatch.register_backends("token_log_probs", cpu=("native",), cuda=("triton",), interpretable=True)

STATISTICS = 4
"""Per row: maximum, sum of e^u, target logit, sum of u e^u, where u = logit - maximum and logits are transformed.

(0, 1, 0, 0) where the row is masked, (-inf, 0, -inf, 0) where it holds nothing but -inf, NaN where it is broken."""


def result_dtype(logits: Tensor) -> torch.dtype:
    """The dtype of per-token results and of the kernels' arithmetic."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def empty_outputs(
    logits: Tensor, entropy: bool, sum_squared_probs: bool, top1_ids: bool, statistics: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The forward's outputs, not yet written; those that are not wanted are empty."""
    shape = logits.shape[:-1]
    sizes = shape or ((),)  # one by one: that is cheaper than as a tuple
    log_probs = logits.new_empty(*sizes, dtype=result_dtype(logits))  # whose dtype the others take: cheaper than named
    empty = log_probs.new_empty
    return (
        log_probs,
        empty(*sizes) if entropy else empty(0),
        empty(*sizes) if sum_squared_probs else empty(0),
        empty(*sizes, dtype=torch.int64) if top1_ids else empty(0, dtype=torch.int64),
        empty(STATISTICS, *shape) if statistics else empty(0),
    )


def empty_gradient(logits: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The backward's output, dense and not yet written, in the dtype of the logits if no other is asked for."""
    return logits.new_empty(logits.shape, dtype=dtype)


def _forward_fake(
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor | None,
    temperature_tensor: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float,
    entropy: bool,
    sum_squared_probs: bool,
    top1_ids: bool,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return empty_outputs(logits, entropy, sum_squared_probs, top1_ids, statistics)


_TRANSFORM = "Tensor? mask, Tensor? temperature_tensor, float temperature, float logit_scale, float softcap"

_token_log_probs = _dispatch.define(
    f"token_log_probs(Tensor logits, Tensor token_ids, {_TRANSFORM}, bool entropy, bool sum_squared_probs, "
    "bool top1_ids, bool statistics, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    package=_PACKAGE,
    fake=_forward_fake,
)
token_log_probs_unwatched = _dispatch.unwatched(_token_log_probs)
token_log_probs = _dispatch.direct(_token_log_probs)


def _backward_fake(logits: Tensor, *arguments: object) -> Tensor:
    return empty_gradient(logits, cast(torch.dtype | None, arguments[-1]))


# Of a part of a vocabulary: the statistics are those of the whole; a token id that the part does not hold is >= its V.
_UPSTREAM = "Tensor statistics, Tensor grad_log_probs, Tensor? grad_entropy, Tensor? grad_log_sum_exp"

token_log_probs_backward = _dispatch.define(
    f"token_log_probs_backward(Tensor logits, Tensor token_ids, {_TRANSFORM}, {_UPSTREAM}, ScalarType? grad_dtype, "
    "str backend) -> Tensor",
    package=_PACKAGE,
    fake=_backward_fake,
)

token_log_probs_backward_ = _dispatch.define(
    f"token_log_probs_backward_(Tensor(a!) logits, Tensor token_ids, {_TRANSFORM}, {_UPSTREAM}, str backend) -> ()",
    package=_PACKAGE,
    fake=lambda *_: None,
)
"""The gradient takes the place of the logits."""
