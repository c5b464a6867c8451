"""The autograd function around the kernels: what every two-pass op on a language-model head is made of."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from grpo_kernels._gemm import accumulation_dtype
from grpo_kernels._token_ids import live_rows
from grpo_kernels.distributed import vocab
from grpo_kernels.linear_log_probs import ops
from grpo_kernels.linear_log_probs.head import Head
from grpo_kernels.token_log_probs.statistics import MAXIMUM, TOTAL


class Wanted(NamedTuple):
    """Which outputs are computed beside the log-probs."""

    entropy: bool = False
    sum_squared_probs: bool = False
    top1_ids: bool = False
    log_sum_exp: bool = False


class LinearRows(NamedTuple):
    """Per row [N]; what was not wanted is None. log_probs, entropy and log_sum_exp are differentiable."""

    log_probs: Tensor
    entropy: Tensor | None
    sum_squared_probs: Tensor | None
    top1_ids: Tensor | None
    log_sum_exp: Tensor | None


class Options(NamedTuple):
    """All that is no tensor."""

    op: str
    gemm_dtype: torch.dtype
    lora_scale: float
    temperature: float
    logit_scale: float
    softcap: float
    wanted: Wanted
    shard: vocab.VocabShard | None
    backend: str


def linear_rows(
    options: Options,
    hidden: Tensor,
    head: Head,
    token_ids: Tensor,
    mask: Tensor | None,
    temperatures: Tensor | None,
    accumulator: Tensor | None = None,
) -> LinearRows:
    """Log-probs and statistics of rows [N] of hidden states [N, H], through kernels.

    Args:
        options: `options.lora_scale` counts, not that of the head.
        head: the caller's parameters, of any dtype. Rows beyond the shard are padding.
        accumulator: [V, H] float32. The weight's gradient is added there, and the weight gets none.
    """
    tensors = (hidden, *head[:4], token_ids, mask, temperatures)
    trained = (hidden, *head[:4])
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in trained):
        results = _LinearRows.apply(options, accumulator, *tensors)  # type: ignore[no-untyped-call]
    else:
        results = _forward(options, tensors, options.shard is not None or options.wanted.log_sum_exp)[0]
    log_probs, *others = results
    return LinearRows(
        log_probs, *(result if want else None for result, want in zip(others, options.wanted, strict=True))
    )


def _cast(options: Options, hidden: Tensor, *head: Tensor | None) -> tuple[Tensor | None, ...]:
    """Hidden states and the head in the dtype of the products, without the shard's padding, and the LoRA scale."""
    cast = [None if t is None else t.detach().to(options.gemm_dtype) for t in (hidden, *head)]
    if options.shard is not None:
        count = options.shard.end - options.shard.start
        for place in (1, 2, 4):  # weight, bias, lora_b
            tensor = cast[place]
            cast[place] = None if tensor is None else tensor[:count]
    return tuple(cast)


def _forward(
    options: Options, tensors: tuple[Tensor | None, ...], with_statistics: bool
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The five outputs, absent ones empty, and the row statistics."""
    hidden, weight, bias, lora_a, lora_b, token_ids, mask, temperatures = tensors
    shard, wanted = options.shard, options.wanted
    if hidden is None or token_ids is None:
        raise TypeError(f"{options.op}: hidden and token_ids must be tensors")
    if shard is not None and shard.start == shard.end:
        results = vocab.of_no_columns(token_ids, accumulation_dtype(options.gemm_dtype))
    else:
        ids = token_ids if shard is None else vocab.forward_ids(shard, token_ids)
        results = ops.linear_token_log_probs(
            *_cast(options, hidden, weight, bias, lora_a, lora_b), options.lora_scale, ids, mask, temperatures,
            options.temperature, options.logit_scale, options.softcap, *wanted[:3], with_statistics, options.backend,
        )  # fmt: skip
    if shard is not None:
        results = vocab.combine(shard, options.op, token_ids, mask, results, wanted[:3])
    *outputs, values = results
    log_sum_exp = values.new_empty(0)
    if wanted.log_sum_exp:
        live = live_rows(token_ids, mask)
        log_sum_exp = torch.where(live, values[MAXIMUM] + values[TOTAL].log(), 0.0)
    return (*outputs, log_sum_exp), values


class _LinearRows(torch.autograd.Function):
    """Saves the inputs and four numbers a row; the backward forms the logits again, slice by slice."""

    @staticmethod
    def forward(
        ctx: Any, options: Options, accumulator: Tensor | None, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        results, statistics = _forward(options, tensors, True)
        ctx.options, ctx.accumulator = options, accumulator
        ctx.save_for_backward(*tensors, statistics)
        ctx.set_materialize_grads(False)
        wanted = options.wanted
        absent = [results[i] for i, want in ((1, wanted.entropy), (4, wanted.log_sum_exp)) if not want]
        ctx.mark_non_differentiable(results[2], results[3], *absent)
        log_probs, entropy, squared, top1, log_sum_exp = results
        return log_probs, entropy, squared, top1, log_sum_exp

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None, *others: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        options: Options = ctx.options
        hidden, weight, bias, lora_a, lora_b, token_ids, mask, temperatures, statistics = ctx.saved_tensors
        shard, accumulator = options.shard, ctx.accumulator
        needs = ctx.needs_input_grad[2:]
        need_lora = needs[3] or needs[4]
        reduced = shard is not None and shard.reduce_hidden_grad
        exact = accumulation_dtype(options.gemm_dtype)
        upstream = [
            None if grad is None or not want else grad.to(exact)
            for grad, want in (
                (grad_log_probs, True), (grad_entropy, options.wanted.entropy),
                (others[2], options.wanted.log_sum_exp),
            )
        ]  # fmt: skip
        padding = 0
        if shard is not None:
            token_ids = vocab.backward_ids(shard, token_ids)
            padding = weight.shape[0] - (shard.end - shard.start)
        target = accumulator if accumulator is None or not padding else accumulator[: weight.shape[0] - padding]
        head = _cast(options, hidden, weight, bias, lora_a, lora_b)
        wanted_of_op = (needs[0], needs[1], needs[2], need_lora, exact if reduced else hidden.dtype, weight.dtype)
        if shard is not None and shard.start == shard.end:
            found = tuple(grad.zero_() for grad in ops.empty_gradients(hidden, weight[:0], lora_a, *wanted_of_op))
        else:
            found = ops.linear_token_log_probs_backward(
                *head, options.lora_scale, token_ids, mask, temperatures, options.temperature, options.logit_scale,
                options.softcap, statistics, *upstream, target, *wanted_of_op, options.backend,
            )  # fmt: skip
        grad_hidden = found[0] if needs[0] else None
        if reduced and shard is not None and grad_hidden is not None:
            grad_hidden = vocab.all_reduce_(shard, grad_hidden).to(hidden.dtype)
        wanted = (False, needs[1] and accumulator is None, needs[2], needs[3], needs[4])
        grads = [grad_hidden, None, None, None, None]
        for place, parameter in ((1, weight), (2, bias), (3, lora_a), (4, lora_b)):
            if not wanted[place] or parameter is None:
                continue
            grad = found[place]
            if place == 3 and shard is not None:  # every rank has lora.a, and the gradient of its own part
                grad = vocab.all_reduce_(shard, grad)
            grad = grad.to(parameter.dtype)
            if padding and place != 3:
                grad = F.pad(grad, (0,) * (2 * grad.ndim - 1) + (padding,))
            grads[place] = grad
        return (None, None, *grads, None, None, None)
