"""The router through the C++ kernels, CPU or CUDA: allocates the outputs and calls the launcher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_kernels import _extension
from grpo_kernels._extension import DTYPE_CODE, pointer
from grpo_kernels.moe_router.arguments import raise_cu_seqlens, raise_replay
from grpo_kernels.moe_router.ops import empty_outputs, result_dtype

# The kernels' numbers for the options: csrc/moe_router/moe_router.h
_SCORING = {"softmax": 0, "topk_softmax": 1, "sigmoid": 2, "sqrtsoftplus": 3}
_GROUP_SCORE = {"top2_sum": 0, "max": 1}
_REPLAY = {torch.uint8: 0, torch.int8: 1, torch.int16: 2, torch.int32: 3, torch.int64: 4}


def _rows(logits: Tensor, top_k: int) -> tuple[Any, ...]:
    tokens, experts = logits.shape
    return (logits.data_ptr(), tokens, logits.stride(0), experts, top_k, DTYPE_CODE[logits.dtype])


def _dense_rows(logits: Tensor) -> Tensor:
    """The kernels stride over rows and take the last axis as it lies."""
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def _sequences(cu_seqlens: Tensor | None) -> tuple[int, bool, int]:
    if cu_seqlens is None:
        return 0, False, 1
    return cu_seqlens.data_ptr(), cu_seqlens.dtype == torch.int64, cu_seqlens.shape[0] - 1


def moe_router(
    logits: Tensor,
    bias: Tensor | None,
    token_mask: Tensor | None,
    replay_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    top_k: int,
    scoring_func: str,
    n_group: int,
    topk_group: int,
    group_score: str,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
    z_loss: bool,
    aux_loss: bool,
    seq_aux_loss: bool,
) -> tuple[Tensor, ...]:
    outputs = empty_outputs(logits, cu_seqlens, top_k, aux_loss, seq_aux_loss)
    rows = _dense_rows(logits)
    bias = None if bias is None else bias.to(result_dtype(logits)).contiguous()
    mask = None if token_mask is None else token_mask.contiguous()
    replay = None if replay_ids is None else replay_ids.contiguous()
    ends = None if cu_seqlens is None else cu_seqlens.contiguous()
    native, execution = _extension.extension(), _extension.execution(logits)
    asked = (z_loss, aux_loss, seq_aux_loss)
    sequences = _sequences(ends)
    workspace = None  # on the CPU the launcher has its own
    if execution[0] >= 0:
        size = native.moe_router_workspace(*logits.shape, sequences[2], asked, True)
        workspace = logits.new_empty(size, dtype=torch.float64)
    bad = native.moe_router(
        *_rows(rows, top_k),
        _SCORING[scoring_func],
        norm_topk_prob,
        routed_scaling_factor,
        asked,
        *sequences,
        n_group,
        topk_group,
        _GROUP_SCORE[group_score],
        pointer(bias),
        pointer(mask),
        pointer(replay),
        0 if replay is None else _REPLAY[replay.dtype],
        pointer(workspace),
        [output.data_ptr() for output in outputs],
        *execution,
    )
    if bad >= logits.shape[0] and ends is not None:
        raise_cu_seqlens(ends, bad - logits.shape[0], logits.shape[0])
    if bad >= 0 and replay is not None:
        raise_replay(replay, bad, logits.shape[1])
    return outputs


def moe_router_backward(
    logits: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    cu_seqlens: Tensor | None,
    balance: Tensor,
    live_tokens: Tensor,
    grad_weights: Tensor | None,
    grad_losses: Tensor | None,
    scoring_func: str,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
    z_loss: bool,
    aux_loss: bool,
    seq_aux_loss: bool,
) -> Tensor:
    grad = logits.new_empty(logits.shape)
    rows = _dense_rows(logits)
    dtype = result_dtype(logits)
    kept = [None if t is None else t.to(dtype).contiguous() for t in (grad_weights, grad_losses)]
    weights, ids = topk_weights.contiguous(), topk_ids.contiguous()
    ends = None if cu_seqlens is None else cu_seqlens.contiguous()
    _extension.extension().moe_router_backward(
        *_rows(rows, ids.shape[1]),
        _SCORING[scoring_func],
        norm_topk_prob,
        routed_scaling_factor,
        (z_loss, aux_loss, seq_aux_loss),
        *_sequences(ends),
        weights.data_ptr(),
        ids.data_ptr(),
        balance.data_ptr(),
        live_tokens.data_ptr(),
        *map(pointer, kept),
        grad.data_ptr(),
        *_extension.execution(logits),
    )
    return grad
