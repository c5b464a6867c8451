"""Schemas of the losses whose gradients are formed in the forward. Imports torch alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from grpo_kernels import _dispatch
from grpo_kernels._gemm import accumulation_dtype
from grpo_kernels.linear_log_probs.ops import GRADIENTS, HEAD, PACKAGE, ROWS, empty_gradients

for _op in ("linear_cross_entropy", "linear_grpo_loss"):
    _dispatch.register_backends(_op, cpu=("native",), cuda=("triton",), interpretable=True)

_END = f"{GRADIENTS}, ScalarType hidden_dtype, ScalarType weight_dtype, str backend"
_RESULTS = "Tensor, Tensor, Tensor, Tensor, Tensor"


def _fake(
    values: int, hidden: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None, *arguments: Any
) -> Any:
    top1_ids: bool = arguments[-7]
    needs_and_dtypes: tuple[Any, ...] = arguments[-6:]
    rows, dtype = hidden.shape[0], accumulation_dtype(hidden.dtype)
    return (
        *(hidden.new_empty(rows, dtype=dtype) for _ in range(values)),
        hidden.new_empty(rows if top1_ids else 0, dtype=torch.int64),
        *empty_gradients(hidden, weight, lora_a, *needs_and_dtypes),
    )


linear_cross_entropy: torch._ops.OpOverload = _dispatch.define(
    f"linear_cross_entropy({HEAD}, {ROWS}, Tensor factor, float z_loss, bool top1_ids, {_END}) -> "
    f"(Tensor, Tensor, Tensor, {_RESULTS})",
    package=PACKAGE,
    fake=partial(_fake, 2),
)
"""log_probs, log_sum_exp and top1_ids [N], and the gradients of sum(factor * (z_loss * log_sum_exp^2 - log_prob)).

The factor is 0-d or [N]; top1_ids are empty where they are not wanted."""

linear_grpo_loss: torch._ops.OpOverload = _dispatch.define(
    f"linear_grpo_loss({HEAD}, {ROWS}, Tensor? old_log_probs, Tensor advantages, Tensor? ref_log_probs, "
    "Tensor? sampler_log_probs, Tensor? token_weights, Tensor factors, Tensor? entropy_factor, "
    "Tensor? kl_coef_tensor, float kl_coef, SymInt sequence_length, int[] options, float[] parameters, "
    f"Tensor? cross_entropy_factors, float z_loss, bool top1_ids, {_END}) -> "
    f"(Tensor, Tensor, Tensor, Tensor, {_RESULTS})",
    package=PACKAGE,
    fake=partial(_fake, 3),
)
"""log_probs, entropy, log_sum_exp and top1_ids [N + M], and the gradients of
sum(factors * token losses) + sum(entropy_factor * entropy)
+ sum(cross_entropy_factors * (z_loss * log_sum_exp^2 - log_prob)).

Per-token tensors are [N], the entropy factor also 0-d; the M rows behind theirs carry cross-entropy, each times its
factor, and no entropy. Rows are sequences of `sequence_length` tokens, M a multiple of it; 0 where the loss takes
tokens one by one. top1_ids are empty where they are not wanted."""
