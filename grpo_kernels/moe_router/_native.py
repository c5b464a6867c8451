"""The router through the C++ kernels, CPU or CUDA: allocates the outputs and calls the launcher."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels import _extension
from grpo_kernels.moe_router.arguments import raise_cu_seqlens, raise_replay
from grpo_kernels.moe_router.ops import empty_outputs, result_dtype

# The kernels' numbers for the options: csrc/moe_router/moe_router.h
_SCORING = {"softmax": 0, "topk_softmax": 1, "sigmoid": 2, "sqrtsoftplus": 3}
_GROUP_SCORE = {"top2_sum": 0, "max": 1}


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
    if bias is not None and bias.dtype != outputs[0].dtype:
        bias = bias.to(outputs[0].dtype)
    native, execution = _extension.extension(), _extension.execution(logits)
    asked = (z_loss, aux_loss, seq_aux_loss)
    workspace = None  # on the CPU the launcher has its own
    if execution[0] >= 0:
        sequences = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
        size = native.moe_router_workspace(*logits.shape, sequences, asked, True)
        workspace = logits.new_empty(size, dtype=torch.float64)
    bad = native.moe_router(
        logits,
        bias,
        token_mask,
        replay_ids,
        cu_seqlens,
        top_k,
        _SCORING[scoring_func],
        norm_topk_prob,
        routed_scaling_factor,
        asked,
        n_group,
        topk_group,
        _GROUP_SCORE[group_score],
        workspace,
        *outputs,
        *execution,
    )
    if bad >= logits.shape[0] and cu_seqlens is not None:
        raise_cu_seqlens(cu_seqlens, bad - logits.shape[0], logits.shape[0])
    if bad >= 0 and replay_ids is not None:
        raise_replay(replay_ids, bad, logits.shape[1])
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
    dtype = result_dtype(logits)
    _extension.extension().moe_router_backward(
        logits,
        topk_weights,
        topk_ids,
        cu_seqlens,
        balance,
        live_tokens,
        None if grad_weights is None else grad_weights.to(dtype),
        None if grad_losses is None else grad_losses.to(dtype),
        grad,
        _SCORING[scoring_func],
        norm_topk_prob,
        routed_scaling_factor,
        (z_loss, aux_loss, seq_aux_loss),
        *_extension.execution(logits),
    )
    return grad
