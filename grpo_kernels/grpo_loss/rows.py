"""The arguments of the loss in one form, and which of their tokens belong to which sequence."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LossInputs(NamedTuple):
    """The arguments of the loss in the one form that every backend takes: floating tensors share a dtype, absent ones
    are None."""

    log_probs: Tensor  # [B, T], or [N] with cu_seqlens
    old_log_probs: Tensor | None  # as log_probs
    advantages: Tensor  # [B, 1], or as log_probs
    mask: Tensor | None  # as log_probs; bool or integer
    ref_log_probs: Tensor | None
    sampler_log_probs: Tensor | None
    token_weights: Tensor | None  # [B, 1], or as log_probs
    entropy: Tensor | None
    entropy_threshold: Tensor | None  # 0-d
    selection: Tensor | None  # as log_probs: 1 where "clip_cov" or "kl_cov" treats the token differently, else 0
    cu_seqlens: Tensor | None  # [B + 1]
    kl_coef: Tensor | float
    entropy_coef: Tensor | float
    num_items: Tensor | float  # 0.0: absent
    max_length: int  # 0: T


class Rows(NamedTuple):
    """Which tokens count, and which sequence each belongs to."""

    live: Tensor
    row_of: Tensor | None  # packed: the sequence of each token; those outside all sequences share one more row
    batch: int

    def sum(self, value: Tensor) -> Tensor:
        """[B, 1], or [B + 1] when packed: sum over the live tokens of each sequence."""
        value = torch.where(self.live, value, 0)
        if self.row_of is None:
            return value.sum(-1, keepdim=True)
        return value.new_zeros(self.batch + 1).index_add(0, self.row_of, value)

    def lengths(self, like: Tensor) -> Tensor:
        """[B, 1] or [B + 1]: live tokens of each sequence, in the dtype of `like`."""
        return self.sum(torch.ones_like(like))

    def spread(self, value: Tensor) -> Tensor:
        """Gives every token the value of its sequence."""
        return value.expand(self.live.shape) if self.row_of is None else value[self.row_of]

    def to_tokens(self, value: Tensor) -> Tensor:
        """Per-token form of an argument that may be [B, 1]; zero where it does not count."""
        if self.row_of is not None and value.ndim == 2:
            value = torch.cat([value[:, 0], value.new_zeros(1)])[self.row_of]
        return torch.where(self.live, value, 0)


def rows_of(log_probs: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Rows:
    live = torch.ones_like(log_probs, dtype=torch.bool) if mask is None else mask != 0
    if cu_seqlens is None:
        return Rows(live, None, log_probs.shape[0])
    batch = cu_seqlens.shape[0] - 1
    positions = torch.arange(log_probs.shape[0], device=log_probs.device)
    index = torch.searchsorted(cu_seqlens.to(positions.dtype), positions, right=True) - 1
    inside = (index >= 0) & (index < batch)
    return Rows(live & inside, torch.where(inside, index, batch), batch)
