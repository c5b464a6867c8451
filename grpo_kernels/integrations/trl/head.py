"""TRL's fused head on `linear_token_log_probs`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from grpo_kernels import _dispatch, linear_token_log_probs
from grpo_kernels._autocast import no_autocast

OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
"""What TRL's head computes beside log-probs, in the order in which it returns them."""

_OWN = {"entropy": "entropy", "log_sum_sq_probs": "sum_squared_probs", "is_top1": "top1_ids"}
_FLOATING = (torch.float32, torch.bfloat16, torch.float16)
_HALF = (torch.bfloat16, torch.float16)


class HeadOutput(NamedTuple):
    """What TRL's head returns, each [N]; None where it was not asked for."""

    log_probs: Tensor
    entropy: Tensor | None
    log_sum_sq_probs: Tensor | None
    mean_logits: Tensor | None
    is_top1: Tensor | None


def fused_head(stock: Any) -> type:
    """A class to stand in the place of TRL's autograd function of the head, `stock`, of which TRL uses `apply`."""

    class FusedLogProbFunction:
        """`stock.apply` on the kernels; it is called itself for what `is_served` says no to."""

        @staticmethod
        def apply(
            hidden: Tensor,
            weight: Tensor,
            bias: Tensor | None,
            targets: Tensor,
            temperature: float,
            chunk_size: int,
            final_logit_softcapping: float | None = None,
            logit_scale: float = 1.0,
            outputs: Sequence[str] = OUTPUTS,
        ) -> tuple[Tensor | None, ...]:
            softcap = final_logit_softcapping
            if is_served(hidden, weight, bias, targets, temperature, softcap, logit_scale, outputs):
                return tuple(head_output(hidden, weight, bias, targets, temperature, softcap, logit_scale, outputs))
            options = (temperature, chunk_size, softcap, logit_scale, outputs)
            results: tuple[Tensor | None, ...] = stock.apply(hidden, weight, bias, targets, *options)
            return results

    return FusedLogProbFunction


def scored_rows(stock: Callable[[torch.device], bool]) -> Callable[[torch.device], bool]:
    """`stock` says whether TRL's head takes only the tokens that have a label, which it does where there is Triton.

    On the CPU it does not, so that shapes stay the same for a compiler. Without one, the rows of the prompts are left
    out there, too.
    """

    def takes_scored_rows_only(device: torch.device) -> bool:
        return stock(device) or (device.type == "cpu" and not torch.compiler.is_compiling())

    return takes_scored_rows_only


def is_served(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    outputs: Sequence[str],
) -> bool:
    """Whether the kernels compute what TRL does for these arguments.

    TRL's own function keeps: float64, which it computes in float32; quantized weights and weights that ZeRO-3
    shards, which the backward must gather again; the mean of capped logits; devices without kernels; and numbers that
    mean something else there or raise, such as a temperature or a softcap of 0.
    """
    return (
        all(is_positive(number) for number in (temperature, 1.0 if softcap is None else softcap))
        and is_number(logit_scale)
        and logit_scale != 0
        and not (softcap is not None and "mean_logits" in outputs)
        and hidden.ndim == 2
        and targets.ndim == 1
        and hidden.dtype in _FLOATING
        and all(_is_plain(parameter) for parameter in (weight, bias) if parameter is not None)
        and has_kernels("linear_token_log_probs", hidden)
    )


def head_output(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    outputs: Sequence[str],
) -> HeadOutput:
    """What TRL's head computes, of [N, H] hidden states and [N] targets; float32, log-probs and entropy differentiable.

    The products' operands have autocast's dtype, else that of the hidden states, as in TRL. The mean of the logits is
    that of the head's rows times the hidden state: no logit is formed for it.
    """
    with _in_dtype_of(hidden, weight):
        rows = linear_token_log_probs(
            hidden,
            weight,
            token_ids(targets, weight.shape[0]),
            bias=bias,
            temperature=temperature,
            logit_scale=logit_scale,
            softcap=softcap,
            outputs=[own for name, own in _OWN.items() if name in outputs],
        )
    mean_logits = None
    if "mean_logits" in outputs:
        mean_logits = _mean_logits(hidden, weight, bias) * (logit_scale / temperature)
    return HeadOutput(
        rows.log_probs,
        rows.entropy,
        None if rows.sum_squared_probs is None else rows.sum_squared_probs.log(),
        mean_logits,
        None if rows.top1_ids is None else rows.top1_ids == targets,
    )


def token_ids(targets: Tensor, vocab: int) -> Tensor:
    """Negative ids are faults in TRL, where grpo_kernels masks the row: they become an id out of range, which raises on
    the CPU and is NaN elsewhere."""
    return targets.where(targets >= 0, vocab)


def has_kernels(op: str, tensor: Tensor) -> bool:
    """Plain PyTorch would form the logits; TRL's own function is better then."""
    return tensor.device.type in ("cpu", "cuda") and _dispatch.resolve(op, tensor) != "reference"


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_positive(value: Any) -> bool:
    return is_number(value) and bool(value > 0)


def _is_plain(parameter: Tensor) -> bool:
    sharded = hasattr(parameter, "ds_id")
    return type(parameter) in (Tensor, Parameter) and parameter.dtype in _FLOATING and not sharded


def _in_dtype_of(hidden: Tensor, weight: Tensor) -> AbstractContextManager[None]:
    """Without autocast TRL casts the weight to the dtype of the hidden states; autocast does so slice by slice."""
    device = hidden.device.type
    if hidden.dtype in _HALF and weight.dtype != hidden.dtype and not torch.is_autocast_enabled(device):
        return torch.autocast(device, dtype=hidden.dtype)
    return nullcontext()


@torch.no_grad()
def _mean_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with no_autocast(hidden.device.type):
        means = hidden.float() @ weight.mean(0, dtype=torch.float32)
        return means if bias is None else means + bias.mean(dtype=torch.float32)
