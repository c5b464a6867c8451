"""The public function: argument checks and the choice of a backend."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_kernels import _checks, _direct, _dispatch, _sharded
from grpo_kernels._autocast import no_autocast
from grpo_kernels.distributed import vocab
from grpo_kernels.token_log_probs import ops, reference
from grpo_kernels.token_log_probs.arguments import (
    check_outputs,
    check_rows,
    check_transform,
    raise_if_outside,
    split_temperature,
)
from grpo_kernels.token_log_probs.function import token_rows
from grpo_kernels.token_log_probs.layout import overwritable

_OP = "token_log_probs"
_known: dict[Any, tuple[bool, bool, bool]] = {}
"""Which outputs were wanted in a call that passed the checks: `_direct.signature` of its tensors, and its options."""
_OF_DTENSOR = (
    "where each rank has a part of the vocabulary, logits.to_local() and "
    "vocab_shard=VocabShard.from_dtensor(logits, mesh_dim, dim=-1)"
)


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
    vocab_shard: vocab.VocabShard | None = None,
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
        vocab_shard: the logits are those of the ids [start, end), other ranks have the rest; token_ids stay those of
            the whole vocabulary, and so do the results, on every rank. Columns beyond end - start are padding. Every
            rank of the group makes the same call with the same rows.

    Returns:
        `TokenLogProbsOutput(log_probs, entropy, sum_squared_probs, top1_ids)`, float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range; on the CPU also where the
            token id of a live row is >= V, or of no rank's part. On other devices such a row is NaN, in value and
            gradient, and nothing out of bounds is read or written. TypeError for DTensors, which are never guessed.
        BackendUnavailable: vocab_shard needs kernels, and there are none for this device and dtype.

    Numerics:
        Accumulated in fp32 and, on the CPU, float64 across blocks; z itself is never rounded. A row's bits depend on
        that row, V and the dtype alone, and are the same in every run. NaN or +inf in a live row, or nothing but -inf,
        makes that row NaN and no other. The log-prob of a -inf token is -inf; its gradient is finite. A row whose
        upstream gradients are zero has gradient 0. With a vocab_shard one all-gather of four to six numbers a row
        replaces the others' logits; they are merged in the order of the ranks, in fp64, and so alike on every rank.

    Source:
        TRL's selective_log_softmax and verl's logprobs_from_logits compute the same log-probs.
    """
    temperatures = temperature if isinstance(temperature, Tensor) else None
    alike = _direct.signature((logits, token_ids, mask, temperatures))
    options = (temperature if temperatures is None else 0.0, logit_scale, softcap, outputs)
    plain = alike is not None and vocab_shard is None and inplace_backward is False and _comparable(*options)
    wanted = _direct.recall(_known, (alike, options)) if plain else None
    if wanted is None:
        wanted = _check(
            logits, token_ids, temperature, logit_scale, softcap, mask, outputs, inplace_backward, vocab_shard
        )
        if plain:
            _direct.remember(_known, (alike, options), wanted)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask != 0
    cap = 0.0 if softcap is None else float(softcap)
    dtype = ops.result_dtype(logits)
    temperatures, number = split_temperature(_OP, temperature, logits.device, dtype)
    backend = _dispatch.resolve(_OP, logits)
    if backend == "reference":
        if vocab_shard is not None:
            raise _dispatch.BackendUnavailable(f"{_OP}: vocab_shard needs kernels")
        divisor = number if temperatures is None else temperatures
        return _reference(logits, token_ids, mask, divisor, float(logit_scale), cap, wanted)
    rows = (logits, token_ids, mask, temperatures, number, float(logit_scale), cap)
    results = token_rows(_OP, *rows, wanted, inplace_backward, vocab_shard, backend, alike is not None)
    log_probs, entropy, squared, top1_ids, *_ = results
    return TokenLogProbsOutput(
        log_probs, entropy if wanted[0] else None, squared if wanted[1] else None, top1_ids if wanted[2] else None
    )


def _comparable(temperature: Any, logit_scale: Any, softcap: Any, outputs: Any) -> bool:
    """Whether options that are equal to these are as good as these: True, 1 and 1.0 are equal, too."""
    numbers = type(temperature) is float and type(logit_scale) is float and (softcap is None or type(softcap) is float)
    return numbers and type(outputs) is tuple


def _check(
    logits: Tensor,
    token_ids: Tensor,
    temperature: Tensor | float,
    logit_scale: float,
    softcap: float | None,
    mask: Tensor | None,
    outputs: Iterable[str],
    inplace_backward: bool,
    vocab_shard: vocab.VocabShard | None,
) -> tuple[bool, bool, bool]:
    """Raises on a bad argument; returns which outputs are wanted."""
    _checks.check_tensor(_OP, "logits", logits)
    _sharded.refuse_dtensor(_OP, "logits", logits, _OF_DTENSOR)
    _checks.check_dtype(_OP, "logits", logits)
    if logits.ndim == 0 or (logits.shape[-1] == 0 and vocab_shard is None):
        raise ValueError(f"{_OP}: logits must have shape [..., V] with V >= 1, got {list(logits.shape)}")
    leading = logits.shape[:-1]
    check_rows(_OP, logits, "logits", leading, "token_ids", token_ids, mask)
    check_transform(_OP, logits, "logits", leading, temperature, logit_scale, softcap)
    if vocab_shard is not None:
        vocab.check(_OP, vocab_shard, logits.shape[-1])
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
    with no_autocast(logits.device.type):
        return TokenLogProbsOutput(
            *reference.token_log_probs(logits, token_ids, mask, temperature, logit_scale, softcap, wanted)
        )
