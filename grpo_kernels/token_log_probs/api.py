"""The public function: argument checks, the choice of a backend, and the autograd function around the kernels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo_kernels import _checks, _dispatch
from grpo_kernels.token_log_probs import ops, reference
from grpo_kernels.token_log_probs.arguments import (
    check_outputs,
    check_rows,
    check_transform,
    raise_if_outside,
    split_temperature,
)
from grpo_kernels.token_log_probs.layout import overwritable

_OP = "token_log_probs"


class TokenLogProbsOutput(NamedTuple):
    """What `token_log_probs` returns, each of the leading shape of the logits; None where it was not asked for.

    Args:
        log_probs: float. Log-prob of each token, nats. Differentiable.
        entropy: float. Entropy of each token's distribution, nats. Differentiable.
        sum_squared_probs: float. Sum of squared probabilities: 1 for a certain token, 1 / V for a uniform one.
        top1_ids: int64. The likeliest token, the lowest id among equals; -1 for masked and NaN rows.
    """

    log_probs: Tensor
    entropy: Tensor | None = None
    sum_squared_probs: Tensor | None = None
    top1_ids: Tensor | None = None


def token_log_probs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: Tensor | float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    outputs: Iterable[str] = (),
    inplace_backward: bool = False,
    vocab_shard: object | None = None,
) -> TokenLogProbsOutput:
    """Log-probs of chosen tokens, and statistics of each token's distribution, without a softmax in memory.

    With z = softcap * tanh(logits * logit_scale / softcap) / temperature (without the tanh where there is no softcap)::

        log_prob = z[token_id] - logsumexp(z)        entropy = -sum_j p_j log p_j        p = softmax(z)

    The logits are read once in the forward and once in the backward; nothing of their size is saved or allocated but
    the gradient, and with `inplace_backward` not even that.

    Args:
        logits: [..., V] bf16, fp16, fp32 or fp64. A view with a dense last axis, such as `logits[:, :-1]`, is not
            copied. -inf means probability zero, also under a softcap.
        token_ids: [...] int32 or int64, in [0, V). Negative = the row is masked.
        temperature: number, 0-d tensor, or [...] tensor, > 0. Not differentiated.
        logit_scale: finite, non-zero factor of the logits.
        softcap: > 0, or None for none.
        mask: [...] bool, or numbers of which non-zero counts. A masked row has log_prob 0, entropy 0,
            sum_squared_probs 0, top1_id -1 and gradient 0, whatever it contains.
        outputs: subset of {"entropy", "sum_squared_probs", "top1_ids"}.
        inplace_backward: the backward overwrites the storage of `logits` with their gradient. Any later use of the
            logits in autograd, a second backward included, raises. Their rows must not overlap, and must need no copy.
            The reference backend ignores it.
        vocab_shard: must be None in this version.

    Returns:
        `TokenLogProbsOutput(log_probs, entropy, sum_squared_probs, top1_ids)`, float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range; on the CPU also where the
            token id of a live row is >= V. On other devices such a row is NaN, in value and gradient, and nothing out
            of bounds is read or written.

    Numerics:
        Accumulated in fp32 and, on the CPU, float64 across blocks; z itself is never rounded. A row's bits depend on
        that row, V and the dtype alone, and are the same in every run. NaN or +inf in a live row, or nothing but -inf,
        makes that row NaN and no other. The log-prob of a -inf token is -inf; its gradient is finite. A row whose
        upstream gradients are zero has gradient 0.

    Source:
        TRL's selective_log_softmax and verl's logprobs_from_logits compute the same log-probs.
    """
    wanted = _check(logits, token_ids, temperature, logit_scale, softcap, mask, outputs, inplace_backward, vocab_shard)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask != 0
    cap = 0.0 if softcap is None else float(softcap)
    dtype = ops.result_dtype(logits)
    temperatures, number = split_temperature(_OP, temperature, logits.device, dtype)
    backend = _dispatch.resolve(_OP, logits)
    if backend == "reference":
        divisor = number if temperatures is None else temperatures
        return _reference(logits, token_ids, mask, divisor, float(logit_scale), cap, wanted)
    arguments = (logits, token_ids, mask, temperatures, number, float(logit_scale), cap, *wanted)
    if torch.is_grad_enabled() and logits.requires_grad:
        results = _TokenLogProbs.apply(*arguments, inplace_backward, backend)  # type: ignore[no-untyped-call]
    else:
        results = ops.token_log_probs(*arguments, False, backend)
    optional = (result if want else None for result, want in zip(results[1:4], wanted, strict=True))
    return TokenLogProbsOutput(results[0], *optional)


def _check(
    logits: Tensor,
    token_ids: Tensor,
    temperature: Tensor | float,
    logit_scale: float,
    softcap: float | None,
    mask: Tensor | None,
    outputs: Iterable[str],
    inplace_backward: bool,
    vocab_shard: object | None,
) -> tuple[bool, bool, bool]:
    """Raises on a bad argument; returns which outputs are wanted."""
    if vocab_shard is not None:
        raise ValueError(f"{_OP}: vocab_shard is not supported by this op in this version; it must be None")
    _checks.check_tensor(_OP, "logits", logits)
    _checks.check_dtype(_OP, "logits", logits)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"{_OP}: logits must have shape [..., V] with V >= 1, got {list(logits.shape)}")
    leading = logits.shape[:-1]
    check_rows(_OP, logits, "logits", leading, "token_ids", token_ids, mask)
    check_transform(_OP, logits, "logits", leading, temperature, logit_scale, softcap)
    wanted = check_outputs(_OP, outputs)
    if not isinstance(inplace_backward, bool):
        raise TypeError(f"{_OP}: inplace_backward must be a bool, got {type(inplace_backward).__name__}")
    if inplace_backward and not overwritable(logits):
        raise ValueError(
            f"{_OP}: inplace_backward needs logits with a dense last axis, at most two other strides and no overlap, "
            f"got shape {list(logits.shape)} with strides {list(logits.stride())}"
        )
    return wanted


def _reference(
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor | None,
    temperature: Tensor | float,
    logit_scale: float,
    softcap: float,
    wanted: tuple[bool, bool, bool],
) -> TokenLogProbsOutput:
    raise_if_outside(_OP, token_ids, mask, logits.shape[-1])
    with torch.autocast(logits.device.type, enabled=False):
        return TokenLogProbsOutput(
            *reference.token_log_probs(logits, token_ids, mask, temperature, logit_scale, softcap, wanted)
        )


class _TokenLogProbs(torch.autograd.Function):
    """Saves the logits and four numbers a row; the backward forms the gradient from them in one pass."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        token_ids: Tensor,
        mask: Tensor | None,
        temperatures: Tensor | None,
        temperature: float,
        logit_scale: float,
        softcap: float,
        entropy: bool,
        sum_squared_probs: bool,
        top1_ids: bool,
        inplace_backward: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        *results, statistics = ops.token_log_probs(
            logits, token_ids, mask, temperatures, temperature, logit_scale, softcap,
            entropy, sum_squared_probs, top1_ids, True, backend,
        )  # fmt: skip
        ctx.save_for_backward(logits, token_ids, mask, temperatures, statistics)
        ctx.options = (temperature, logit_scale, softcap, entropy, inplace_backward, backend)
        ctx.mark_non_differentiable(results[2], results[3], *([] if entropy else [results[1]]))
        return results[0], results[1], results[2], results[3]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor, grad_entropy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        logits, token_ids, mask, temperatures, statistics = ctx.saved_tensors
        temperature, logit_scale, softcap, entropy, inplace_backward, backend = ctx.options
        arguments = (
            logits, token_ids, mask, temperatures, temperature, logit_scale, softcap, statistics, grad_log_probs,
            grad_entropy if entropy else None, None,
        )  # fmt: skip
        if inplace_backward:
            ops.token_log_probs_backward_(*arguments, backend)
            grad = logits.detach()
        else:
            grad = ops.token_log_probs_backward(*arguments, None, backend)
        return (grad, *([None] * 11))
