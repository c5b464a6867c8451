"""The autograd function around the kernels, for whole rows and for a rank's part of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from grpo_kernels.distributed import vocab
from grpo_kernels.token_log_probs import ops


def token_rows(
    op: str,
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float,
    wanted: tuple[bool, bool, bool],
    inplace_backward: bool,
    shard: vocab.VocabShard | None,
    backend: str,
    unwatched: bool = False,
) -> tuple[Tensor, ...]:
    """log_probs, entropy, sum of squared probabilities, top-1 ids; what is not wanted is empty or None.

    Args:
        op: who asks, for messages.
        shard: the part of the vocabulary that the logits are of; columns beyond it are padding.
        unwatched: the tensors have a `_direct.signature`.
    """
    targets = (token_ids, mask, temperatures, temperature, logit_scale, softcap)
    if torch.is_grad_enabled() and logits.requires_grad:
        arguments = (logits, targets, wanted, inplace_backward, shard, op, backend, unwatched)
        applied: tuple[Tensor, ...] = _TokenRows.apply(*arguments)  # type: ignore[no-untyped-call]
        return applied
    rows = (logits, *targets)
    if shard is None:
        kernel = ops.token_log_probs_unwatched if unwatched else ops.token_log_probs
        results: tuple[Tensor, ...] = kernel(*rows, *wanted, False, backend)
        return results
    return _sharded(op, rows, wanted, shard, backend)


def _sharded(
    op: str, rows: tuple[Any, ...], wanted: tuple[bool, bool, bool], shard: vocab.VocabShard, backend: str
) -> tuple[Tensor, ...]:
    """The five outputs of the whole rows, from a rank's part of the logits."""
    logits, token_ids, mask, *transform = rows
    columns = shard.end - shard.start
    if columns == 0:
        part = vocab.of_no_columns(token_ids, ops.result_dtype(logits))
    else:
        ids = vocab.forward_ids(shard, token_ids)
        part = ops.token_log_probs(logits[..., :columns], ids, mask, *transform, *wanted, True, backend)
    return vocab.combine(shard, op, token_ids, mask, part, wanted)


class _TokenRows(torch.autograd.Function):
    """Saves the logits and four numbers a row; the backward forms the gradient from them in one pass."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: tuple[Any, ...],
        wanted: tuple[bool, bool, bool],
        inplace_backward: bool,
        shard: vocab.VocabShard | None,
        op: str,
        backend: str,
        unwatched: bool,
    ) -> tuple[Tensor | None, ...]:
        token_ids, mask, temperatures, *numbers = targets
        rows = (logits, *targets)
        if shard is None:
            kernel = ops.token_log_probs_unwatched if unwatched else ops.token_log_probs
            results = kernel(*rows, *wanted, True, backend)
        else:
            results = _sharded(op, rows, wanted, shard, backend)
        log_probs, entropy, squared, top1, statistics = results
        ctx.save_for_backward(logits, token_ids, mask, temperatures, statistics)
        ctx.options = numbers
        ctx.inplace, ctx.shard, ctx.backend = inplace_backward, shard, backend
        ctx.mark_non_differentiable(*(value for value, want in ((squared, wanted[1]), (top1, wanted[2])) if want))
        return log_probs, entropy if wanted[0] else None, squared if wanted[1] else None, top1 if wanted[2] else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor, grad_entropy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        logits, token_ids, mask, temperatures, statistics = ctx.saved_tensors
        upstream = (statistics, grad_log_probs, grad_entropy, None)
        columns = logits.shape[-1]
        part = logits
        if ctx.shard is not None:
            columns = ctx.shard.end - ctx.shard.start
            token_ids, part = vocab.backward_ids(ctx.shard, token_ids), logits[..., :columns]
        arguments = (part, token_ids, mask, temperatures, *ctx.options, *upstream)
        padding = logits.shape[-1] - columns
        if ctx.inplace:
            if columns > 0:
                ops.token_log_probs_backward_(*arguments, ctx.backend)
            if padding > 0:
                logits[..., columns:].zero_()
            grad = logits.detach()
        elif columns == 0:
            grad = torch.zeros_like(logits)
        else:
            grad = ops.token_log_probs_backward(*arguments, None, ctx.backend)
            grad = F.pad(grad, (0, padding)) if padding > 0 else grad
        return (grad, *([None] * 7))
