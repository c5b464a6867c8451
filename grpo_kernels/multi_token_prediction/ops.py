"""Schemas of multi-token prediction. Imports torch alone, so that they exist before anything is traced."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels import _dispatch

_PACKAGE = "grpo_kernels.multi_token_prediction"

_dispatch.register_backends("mtp_linear_cross_entropy", cpu=("native",), cuda=("triton",), interpretable=True)


def empty_targets(
    token_ids: Tensor,
    positions: Tensor | None,
    mask: Tensor | None,
    depths: int,
    shift: int,
    sequence_length: int,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """The outputs of mtp_targets, not yet written."""
    return (
        token_ids.new_empty((depths, token_ids.shape[0]), dtype=torch.int64),
        token_ids.new_empty(depths, dtype=torch.int64),
    )


mtp_targets = _dispatch.define(
    "mtp_targets(Tensor token_ids, Tensor? positions, Tensor? mask, int depths, SymInt shift, SymInt sequence_length, "
    "int ignore_index, str backend) -> (Tensor, Tensor)",
    package=_PACKAGE,
    definition="reference",
    fake=empty_targets,
)
"""targets [depths, N] int64: the token that row i of depth k predicts, that of row i + k + shift, or -1; and how many
of each depth there are, [depths] int64. Documents end at multiples of sequence_length (0: they do not) and wherever the
positions do not go on by one; a row whose position is negative predicts nothing."""
