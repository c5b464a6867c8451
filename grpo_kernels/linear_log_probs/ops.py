"""Schemas of the linear log-prob kernels. Imports torch alone, so that they exist before anything is traced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_kernels import _dispatch
from grpo_kernels._gemm import accumulation_dtype

PACKAGE = "grpo_kernels.linear_log_probs"
STATISTICS = 4
"""Per row, as in token_log_probs: maximum, sum of e^u, target logit, sum of u e^u."""

HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor? lora_a, Tensor? lora_b, float lora_scale"
"""[N, H], [V, H], [V], [r, H], [V, r]: of one dtype."""
ROWS = "Tensor token_ids, Tensor? mask, Tensor? temperature_tensor, float temperature, float logit_scale, float softcap"
GRADIENTS = "bool need_hidden, bool need_weight, bool need_bias, bool need_lora"

_dispatch.register_backends("linear_token_log_probs", cpu=("native",), cuda=("triton",), interpretable=True)


def empty_outputs(
    hidden: Tensor, entropy: bool, sum_squared_probs: bool, top1_ids: bool, statistics: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The forward's outputs, not yet written; those that are not wanted are empty."""
    rows, dtype = hidden.shape[0], accumulation_dtype(hidden.dtype)

    def output(wanted: bool, *size: int, dtype: torch.dtype = dtype) -> Tensor:
        return hidden.new_empty(size if wanted else (0,), dtype=dtype)

    return (
        output(True, rows),
        output(entropy, rows),
        output(sum_squared_probs, rows),
        output(top1_ids, rows, dtype=torch.int64),
        output(statistics, STATISTICS, rows),
    )


def empty_gradients(
    hidden: Tensor,
    weight: Tensor,
    lora_a: Tensor | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    need_lora: bool,
    hidden_dtype: torch.dtype,
    weight_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight, bias and the LoRA factors, not yet written; those that are not wanted are empty."""
    vocab, width = weight.shape
    dtype = accumulation_dtype(hidden.dtype)
    rank = 0 if lora_a is None else lora_a.shape[0]

    def gradient(wanted: bool, *size: int, dtype: torch.dtype = dtype) -> Tensor:
        return hidden.new_empty(size if wanted else (0,), dtype=dtype)

    return (
        gradient(need_hidden, *hidden.shape, dtype=hidden_dtype),
        gradient(need_weight, vocab, width, dtype=weight_dtype),
        gradient(need_bias, vocab),
        gradient(need_lora, rank, width),
        gradient(need_lora, vocab, rank),
    )


def _forward_fake(hidden: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return empty_outputs(hidden, *arguments[-4:])


def _backward_fake(hidden: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    accumulator, (need_hidden, need_weight), rest = arguments[-7], arguments[-6:-4], arguments[-4:]
    return empty_gradients(hidden, weight, arguments[1], need_hidden, need_weight and accumulator is None, *rest)


linear_token_log_probs = _dispatch.define(
    f"linear_token_log_probs({HEAD}, {ROWS}, bool entropy, bool sum_squared_probs, bool top1_ids, bool statistics, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    package=PACKAGE,
    fake=_forward_fake,
)
"""Log-probs, entropy, sums of squared probabilities, top-1 ids and row statistics, as the op of token_log_probs."""

linear_token_log_probs_backward = _dispatch.define(
    f"linear_token_log_probs_backward({HEAD}, {ROWS}, Tensor statistics, Tensor? grad_log_probs, Tensor? grad_entropy, "
    f"Tensor? grad_log_sum_exp, Tensor(a!)? weight_grad_accumulator, {GRADIENTS}, ScalarType hidden_dtype, "
    "ScalarType weight_dtype, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    package=PACKAGE,
    fake=_backward_fake,
)
"""Gradients of hidden, weight, bias and the LoRA factors. The statistics may be those of a larger vocabulary, of which
this head holds a part; a live row whose id is >= V has its target elsewhere."""
