"""The autograd functions around the kernels. What they save is the maps: 8 bytes for a token's copy.

`unwatched`: the tensors have a `_direct.signature`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo_kernels.moe_permute import ops


class Permute(torch.autograd.Function):
    """Its backward sums, in slot order, the gradients of a token's rows."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, row_id_map: Tensor, inv_map: Tensor, backend: str, unwatched: bool = False
    ) -> Tensor:
        ctx.save_for_backward(row_id_map)
        ctx.backend = backend
        kernel = ops.moe_permute_unwatched if unwatched else ops.moe_permute
        rows: Tensor = kernel(x, row_id_map, inv_map, None, backend)
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (row_id_map,) = ctx.saved_tensors
        return ops.moe_unpermute(grad, row_id_map, None, ctx.backend), None, None, None, None


class Unpermute(torch.autograd.Function):
    """Keeps the rows only where the weights want a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        row_id_map: Tensor,
        inv_map: Tensor,
        topk_weights: Tensor | None,
        backend: str,
        unwatched: bool = False,
    ) -> Tensor:
        ctx.save_for_backward(y if ctx.needs_input_grad[3] else None, row_id_map, inv_map, topk_weights)
        ctx.backend = backend
        kernel = ops.moe_unpermute_unwatched if unwatched else ops.moe_unpermute
        tokens: Tensor = kernel(y, row_id_map, topk_weights, backend)
        return tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, row_id_map, inv_map, topk_weights = ctx.saved_tensors
        if y is None:
            grad_y = ops.moe_permute(grad, row_id_map, inv_map, topk_weights, ctx.backend)
            return grad_y, None, None, None, None, None
        grad_y, grad_weights = ops.moe_unpermute_backward(grad, y, row_id_map, inv_map, topk_weights, ctx.backend)
        return grad_y, None, None, grad_weights, None, None
