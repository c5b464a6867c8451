"""The moves of the permutation through Triton: the launchers."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from grpo_kernels._extension import pointer
from grpo_kernels._launch import on_device
from grpo_kernels.moe_permute._kernels_triton import (
    PADDING_ROWS,
    launch_config,
    permute_kernel,
    unpermute_backward_kernel,
    unpermute_kernel,
)
from grpo_kernels.moe_permute._quantize_triton import moe_permute_quantize
from grpo_kernels.moe_permute.layout import dense_rows
from grpo_kernels.moe_permute.ops import empty_gradients, empty_rows, empty_tokens

__all__ = ["moe_permute", "moe_permute_quantize", "moe_unpermute", "moe_unpermute_backward"]


def _aligned(rows: Tensor) -> bool:
    """Whether every row can be read 16 bytes a thread, and Triton knows: it sees multiples of 16 elements."""
    return pointer(rows) % 16 == 0 and rows.shape[1] % 16 == 0 and rows.stride(0) % 16 == 0


def _weights(topk_weights: Tensor | None) -> Tensor | None:
    return None if topk_weights is None else topk_weights.to(torch.float32).contiguous()


def moe_permute(x: Tensor, row_id_map: Tensor, inv_map: Tensor, topk_weights: Tensor | None) -> Tensor:
    out = empty_rows(x, row_id_map, inv_map, topk_weights)
    if out.numel() == 0:
        return out
    x = dense_rows(x)
    (tokens, top_k), rows, hidden = row_id_map.shape, inv_map.shape[0], x.shape[1]
    config = launch_config(hidden, top_k, x.element_size())
    block = config.lanes * config.width
    with on_device(x):
        permute_kernel[(tokens + triton.cdiv(rows, PADDING_ROWS), triton.cdiv(hidden, block))](
            x,
            row_id_map.contiguous(),
            inv_map.contiguous(),
            _weights(topk_weights),
            out,
            tokens,
            rows,
            top_k,
            hidden,
            x.stride(0),
            WEIGHTED=topk_weights is not None,
            SLOTS=config.slots,
            PADDING=PADDING_ROWS,
            BLOCK=block,
            num_warps=config.num_warps,
        )
    return out


def moe_unpermute(y: Tensor, row_id_map: Tensor, topk_weights: Tensor | None) -> Tensor:
    out = empty_tokens(y, row_id_map, topk_weights)
    if out.numel() == 0:
        return out
    y = dense_rows(y)
    (tokens, top_k), hidden = row_id_map.shape, y.shape[1]
    config = launch_config(hidden, top_k, y.element_size())
    block = config.lanes * config.width
    with on_device(y):
        unpermute_kernel[(tokens, triton.cdiv(hidden, block))](
            y,
            row_id_map.contiguous(),
            _weights(topk_weights),
            out,
            y.shape[0],
            top_k,
            hidden,
            y.stride(0),
            WEIGHTED=topk_weights is not None,
            SLOTS=config.slots,
            BLOCK=block,
            num_warps=config.num_warps,
        )
    return out


def moe_unpermute_backward(
    grad: Tensor, y: Tensor, row_id_map: Tensor, inv_map: Tensor, topk_weights: Tensor
) -> tuple[Tensor, Tensor]:
    grad_y, grad_weights = empty_gradients(grad, y, row_id_map, inv_map, topk_weights)
    (tokens, top_k), (rows, hidden) = row_id_map.shape, y.shape
    if grad_weights.numel() + grad_y.numel() == 0:
        return grad_y, grad_weights
    grad, y = dense_rows(grad), dense_rows(y)
    aligned = all(_aligned(rows_of) for rows_of in (grad, y, grad_y))
    config = launch_config(hidden, top_k, y.element_size(), aligned)
    with on_device(y):
        unpermute_backward_kernel[(tokens + triton.cdiv(rows, PADDING_ROWS), triton.cdiv(top_k, config.slots))](
            grad,
            y,
            row_id_map.contiguous(),
            inv_map.contiguous(),
            _weights(topk_weights),
            grad_y,
            grad_weights,
            tokens,
            rows,
            top_k,
            hidden,
            grad.stride(0),
            y.stride(0),
            SLOTS=config.slots,
            PADDING=PADDING_ROWS,
            LANES=config.lanes,
            WIDTH=config.width,
            NEIGHBOURS=config.neighbours,
            num_warps=config.num_warps,
        )
    return grad_y, grad_weights
