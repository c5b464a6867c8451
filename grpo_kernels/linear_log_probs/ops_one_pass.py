"""Schemas of the losses whose gradients are formed in the forward. Imports torch alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_kernels import _dispatch
from grpo_kernels._gemm import accumulation_dtype
from grpo_kernels.linear_log_probs.ops import GRADIENTS, HEAD, PACKAGE, ROWS, empty_gradients

for _op in ("linear_cross_entropy", "linear_grpo_loss"):
    _dispatch.register_backends(_op, cpu=("native",), cuda=("triton",), interpretable=True)

_END = f"{GRADIENTS}, ScalarType hidden_dtype, ScalarType weight_dtype, str backend"
_RESULTS = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"


def _fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None, *arguments: Any) -> Any:
    needs_and_dtypes: tuple[Any, ...] = arguments[-6:]
    dtype = accumulation_dtype(hidden.dtype)
    values = (hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in range(2))
    return (*values, *empty_gradients(hidden, weight, lora_a, *needs_and_dtypes))


linear_cross_entropy: torch._ops.OpOverload = _dispatch.define(
    f"linear_cross_entropy({HEAD}, Tensor token_ids, Tensor? mask, float logit_scale, float softcap, Tensor factor, "
    f"float z_loss, {_END}) -> {_RESULTS}",
    package=PACKAGE,
    fake=_fake,
)
"""log_probs and log_sum_exp [N], and the gradients of factor * sum(z_loss * log_sum_exp^2 - log_prob)."""

linear_grpo_loss: torch._ops.OpOverload = _dispatch.define(
    f"linear_grpo_loss({HEAD}, {ROWS}, Tensor? old_log_probs, Tensor advantages, Tensor? ref_log_probs, "
    "Tensor? sampler_log_probs, Tensor? token_weights, Tensor factors, Tensor? entropy_factor, "
    "Tensor? kl_coef_tensor, float kl_coef, SymInt sequence_length, int[] options, float[] parameters, "
    f"{_END}) -> {_RESULTS}",
    package=PACKAGE,
    fake=_fake,
)
"""log_probs and entropy [N], and the gradients of sum(factors * token losses) + entropy_factor * sum(entropy).

Per-token tensors are [N]. Rows are sequences of `sequence_length` tokens; 0 where the loss takes tokens one by one."""
