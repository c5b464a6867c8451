"""Schemas of the router's kernels. Imports torch alone, so that they exist before anything is traced."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels import _dispatch

_PACKAGE = "grpo_kernels.moe_router"

_dispatch.register_backends("moe_router", cpu=("native",), cuda=("native",))


def result_dtype(logits: Tensor) -> torch.dtype:
    """The dtype of the weights and losses, and of the kernels' arithmetic."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def balance_rows(cu_seqlens: Tensor | None, aux_loss: bool, seq_aux_loss: bool) -> int:
    """Rows of `balance`: one for the auxiliary loss, then one for each sequence."""
    sequences = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (1 if aux_loss else 0) + (sequences if seq_aux_loss else 0)


def empty_outputs(
    logits: Tensor, cu_seqlens: Tensor | None, top_k: int, aux_loss: bool, seq_aux_loss: bool
) -> tuple[Tensor, ...]:
    """The forward's outputs, not yet written. To take the dtype from another tensor is cheaper than to name it, and
    sizes as they are than as a tuple."""
    tokens, experts = logits.shape
    weights = logits.new_empty(tokens, top_k, dtype=result_dtype(logits))
    ids = logits.new_empty(tokens, top_k, dtype=torch.int32)
    return (
        weights,
        ids,
        ids.new_empty(experts),
        weights.new_empty(3),
        ids.new_empty(()),
        weights.new_empty(balance_rows(cu_seqlens, aux_loss, seq_aux_loss), experts),
        ids.new_empty(()),
    )


def _forward_fake(
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
    return empty_outputs(logits, cu_seqlens, top_k, aux_loss, seq_aux_loss)


_moe_router = _dispatch.define(
    "moe_router(Tensor logits, Tensor? bias, Tensor? token_mask, Tensor? replay_ids, Tensor? cu_seqlens, int top_k, "
    "str scoring_func, int n_group, int topk_group, str group_score, bool norm_topk_prob, "
    "float routed_scaling_factor, bool z_loss, bool aux_loss, bool seq_aux_loss, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    package=_PACKAGE,
    fake=_forward_fake,
)
moe_router_unwatched = _dispatch.unwatched(_moe_router)
moe_router = _dispatch.direct(_moe_router)
"""topk_weights [T, K], topk_ids [T, K], tokens_per_expert [E], losses [3] (z, auxiliary, sequence-wise; without
coefficients, 0 where not asked for), replay_mismatch [], balance [rows, E], live_tokens [].

balance: d loss / d p of every expert, a row for the auxiliary loss if asked for, then one for each sequence if asked
for, for tokens that are not masked. It comes from counts alone.
"""

moe_router_backward = _dispatch.define(
    "moe_router_backward(Tensor logits, Tensor topk_weights, Tensor topk_ids, Tensor? cu_seqlens, Tensor balance, "
    "Tensor live_tokens, Tensor? grad_weights, Tensor? grad_losses, str scoring_func, bool norm_topk_prob, "
    "float routed_scaling_factor, bool z_loss, bool aux_loss, bool seq_aux_loss, str backend) -> Tensor",
    package=_PACKAGE,
    fake=lambda logits, *_: logits.new_empty(logits.shape),
)
"""The gradient of the logits, dense, in their dtype. Ids of -1 mark masked rows, NaN weights broken ones."""
