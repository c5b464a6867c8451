"""The autograd function around the kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo_kernels.moe_router import ops
from grpo_kernels.moe_router.options import RouterOptions


def route(
    logits: Tensor,
    bias: Tensor | None,
    token_mask: Tensor | None,
    replay_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    options: RouterOptions,
    backend: str,
    unwatched: bool,
) -> tuple[Tensor, ...]:
    """topk_weights, topk_ids, tokens_per_expert, losses [3] and replay_mismatch.

    Args:
        unwatched: the tensors have a `_direct.signature`.
    """
    inputs = (logits, bias, token_mask, replay_ids, cu_seqlens)
    if torch.is_grad_enabled() and logits.requires_grad:
        applied: tuple[Tensor, ...] = _Route.apply(logits, inputs[1:], options, backend, unwatched)  # type: ignore[no-untyped-call]
        return applied
    kernel = ops.moe_router_unwatched if unwatched else ops.moe_router
    results: tuple[Tensor, ...] = kernel(*inputs, *options, backend)
    return results[:5]


class _Route(torch.autograd.Function):
    """Saves the logits, which the caller has, the weights and ids, and a column of numbers for each balance loss."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        others: tuple[Tensor | None, ...],
        options: RouterOptions,
        backend: str,
        unwatched: bool,
    ) -> tuple[Tensor, ...]:
        kernel = ops.moe_router_unwatched if unwatched else ops.moe_router
        results = kernel(logits, *others, *options, backend)
        weights, ids, per_expert, losses, mismatch, balance, live_tokens = results
        asked = options[-3:]
        ctx.save_for_backward(logits, weights, ids, others[3] if asked[2] else None, balance, live_tokens)
        ctx.options, ctx.backend = (options[1], *options[5:]), backend
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(ids, per_expert, mismatch, *([] if any(asked) else [losses]))
        return weights, ids, per_expert, losses, mismatch

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_weights: Tensor | None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad = ops.moe_router_backward(*ctx.saved_tensors, grad_weights, grads[2], *ctx.options, ctx.backend)
        return grad, None, None, None, None
