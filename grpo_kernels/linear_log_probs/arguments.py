"""Checks of the arguments that the ops on a language-model head share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels import _checks
from grpo_kernels.distributed import vocab
from grpo_kernels.linear_log_probs.head import Head, LoRAFactors
from grpo_kernels.linear_log_probs.weights import check_weight


class HeadArguments(NamedTuple):
    """The head's arguments after their checks."""

    hidden: Tensor  # [N, H]
    leading: torch.Size
    head: Head
    vocab: int  # columns of the head, without the padding of a shard


def check_head(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora: LoRAFactors | None,
    vocab_shard: vocab.VocabShard | None,
    weight_grad_accumulator: Tensor | None,
) -> HeadArguments:
    """Raises on a bad argument; returns them in the form of the kernels."""
    _checks.check_tensor(op, "hidden", hidden)
    _checks.check_dtype(op, "hidden", hidden)
    if hidden.ndim == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"{op}: hidden must have shape [..., H] with H >= 1, got {list(hidden.shape)}")
    check_weight(op, weight)
    _like_hidden(op, "weight", weight, hidden)
    width = hidden.shape[-1]
    if weight.ndim != 2 or weight.shape[1] != width or (weight.shape[0] == 0 and vocab_shard is None):
        raise ValueError(f"{op}: weight must have shape [V, H] = [V, {width}] with V >= 1, got {list(weight.shape)}")
    columns = weight.shape[0]
    if bias is not None:
        _like_hidden(op, "bias", bias, hidden)
        _checks.check_shape(op, "bias", bias, ("[V]", (columns,)))
    if lora is not None:
        _check_lora(op, lora, hidden, columns)
    if weight_grad_accumulator is not None:
        _check_accumulator(op, weight_grad_accumulator, weight)
    if vocab_shard is not None:
        vocab.check(op, vocab_shard, columns)
        columns = vocab_shard.end - vocab_shard.start
    factors = (None, None, 0.0) if lora is None else (lora.a, lora.b, float(lora.scale))
    return HeadArguments(hidden.reshape(-1, width), hidden.shape[:-1], Head(weight, bias, *factors), columns)


def _like_hidden(op: str, name: str, value: Tensor, hidden: Tensor) -> None:
    _checks.check_tensor(op, name, value)
    _checks.check_dtype(op, name, value)
    _checks.check_same_device(op, name, value, "hidden", hidden)


def _check_lora(op: str, lora: LoRAFactors, hidden: Tensor, columns: int) -> None:
    if not isinstance(lora, LoRAFactors):
        raise TypeError(f"{op}: lora must be LoRAFactors(a, b, scale), got {type(lora).__name__}")
    _like_hidden(op, "lora.a", lora.a, hidden)
    _like_hidden(op, "lora.b", lora.b, hidden)
    width = hidden.shape[-1]
    if lora.a.ndim != 2 or lora.a.shape[0] == 0 or lora.a.shape[1] != width:
        raise ValueError(f"{op}: lora.a must have shape [r, H] = [r, {width}] with r >= 1, got {list(lora.a.shape)}")
    _checks.check_shape(op, "lora.b", lora.b, ("[V, r]", (columns, lora.a.shape[0])))
    _checks.check_number(op, "lora.scale", lora.scale)


def _check_accumulator(op: str, accumulator: Tensor, weight: Tensor) -> None:
    name = "weight_grad_accumulator"
    _checks.check_tensor(op, name, accumulator)
    wanted = torch.float64 if weight.dtype == torch.float64 else torch.float32
    _checks.check_dtype(op, name, accumulator, (wanted,))
    _checks.check_shape(op, name, accumulator, ("[V, H]", tuple(weight.shape)))
    _checks.check_same_device(op, name, accumulator, "weight", weight)
    if accumulator.stride(-1) != 1 or accumulator.requires_grad:
        raise ValueError(f"{op}: {name} must have a dense last axis and not require a gradient itself")
    if torch.is_grad_enabled() and not weight.requires_grad:
        raise ValueError(f"{op}: {name} is for the gradient of weight, which does not require one")
