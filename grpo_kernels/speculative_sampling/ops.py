"""Schema of the verification. Imports torch alone, so that it exists before anything is traced."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels import _dispatch

_PACKAGE = "grpo_kernels.speculative_sampling"

_dispatch.register_backends("verify_draft", cpu=("native",), cuda=("triton",), interpretable=True)

MODES = ("token", "block", "greedy")
"""The rules of acceptance, in the order of their numbers in csrc/speculative_sampling."""


def result_dtype(logits: Tensor) -> torch.dtype:
    """The dtype of the arithmetic, of log-probs, and of the temperatures and shares of mass that kernels take."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def empty_outputs(target_logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """token_ids, num_accepted and log_probs, not yet written."""
    batch, positions = target_logits.shape[:2]
    return (
        target_logits.new_empty((batch, positions), dtype=torch.int64),
        target_logits.new_empty((batch,), dtype=torch.int64),
        target_logits.new_empty((batch, positions), dtype=result_dtype(target_logits)),
    )


def _fake(target_logits: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return empty_outputs(target_logits)


verify_draft = _dispatch.define(
    "verify_draft(Tensor target_logits, Tensor draft_ids, Tensor? draft_logits, Tensor? draft_lengths, "
    "Tensor? temperatures, Tensor? top_k, Tensor? top_p, Tensor seeds, Tensor? offsets, str mode, str backend) "
    "-> (Tensor token_ids, Tensor num_accepted, Tensor log_probs)",
    package=_PACKAGE,
    definition="reference",
    fake=_fake,
)
"""temperatures, top_p [B] of `result_dtype`, None: 1; top_k, draft_lengths, offsets [B] int64, None: V, K, 0; seeds [B]
int64."""
