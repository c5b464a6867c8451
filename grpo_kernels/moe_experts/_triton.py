"""The experts' activation through Triton: the launchers."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from grpo_kernels._launch import on_device
from grpo_kernels.moe_experts._fp8_triton import moe_glu_backward_quantize, moe_glu_quantize
from grpo_kernels.moe_experts._kernels_triton import BLOCK, WARPS, glu_backward_kernel, glu_kernel, rows_of_program
from grpo_kernels.moe_experts.ops import empty_activated, empty_gradients

__all__ = ["moe_glu", "moe_glu_backward", "moe_glu_backward_quantize", "moe_glu_quantize"]


def _memory(preact: Tensor, interleaved: bool) -> Tensor:
    """Dense pre-activations as the kernels load them: interleaved ones in pairs, as integers."""
    preact = preact.contiguous()
    if not interleaved:
        return preact
    if preact.storage_offset() % 2:
        preact = preact.clone()
    return preact.view(torch.int64 if preact.element_size() == 4 else torch.int32)


def moe_glu(
    preact: Tensor,
    inv_map: Tensor,
    topk_weights: Tensor | None,
    clamped: bool,
    alpha: float,
    limit: float,
    interleaved: bool,
) -> Tensor:
    activated = empty_activated(preact)
    rows, width = activated.shape
    if rows == 0:
        return activated
    of_program = rows_of_program(preact.element_size(), interleaved)
    with on_device(preact):
        glu_kernel[(triton.cdiv(rows, of_program), triton.cdiv(width, BLOCK))](
            _memory(preact, interleaved),
            inv_map.contiguous(),
            None if topk_weights is None else topk_weights.contiguous(),
            activated,
            alpha,
            limit,
            rows,
            0 if topk_weights is None else topk_weights.numel(),
            width,
            CLAMPED=clamped,
            INTERLEAVED=interleaved,
            WEIGHTED=topk_weights is not None,
            ROWS=of_program,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return activated


def moe_glu_backward(
    preact: Tensor,
    grad_activated: Tensor,
    inv_map: Tensor,
    topk_weights: Tensor,
    row_terms: Tensor | None,
    clamped: bool,
    alpha: float,
    limit: float,
    interleaved: bool,
    need_preact: bool,
    need_activated: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = empty_gradients(preact, topk_weights, need_preact, need_activated, need_weights)
    rows, width = grad_activated.shape
    if rows == 0:
        return outputs
    of_program = rows_of_program(preact.element_size(), interleaved)
    with on_device(preact):
        glu_backward_kernel[(triton.cdiv(rows, of_program),)](
            _memory(preact, interleaved),
            grad_activated.contiguous(),
            inv_map.contiguous(),
            topk_weights.contiguous(),
            None if row_terms is None else row_terms.contiguous(),
            _memory(outputs[0], interleaved),
            *outputs[1:],
            alpha,
            limit,
            rows,
            topk_weights.numel(),
            width,
            CLAMPED=clamped,
            INTERLEAVED=interleaved,
            HAS_TERMS=row_terms is not None,
            PREACT=need_preact,
            ACTIVATED=need_activated,
            WEIGHTS=need_weights,
            ROWS=of_program,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return outputs
