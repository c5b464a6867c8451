"""What the one-pass losses know of rows: what the row kernels take, what they give, and the derivatives of the loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels._gemm import accumulation_dtype


class Targets(NamedTuple):
    """What the row kernels take beside the logits."""

    token_ids: Tensor
    mask: Tensor | None
    temperatures: Tensor | None
    temperature: float
    logit_scale: float
    softcap: float

    def at(self, rows: slice | Tensor) -> Targets:
        """Those of some of the rows."""
        temperatures = self.temperatures
        if temperatures is not None and temperatures.ndim > 0:
            temperatures = temperatures[rows]
        mask = None if self.mask is None else self.mask[rows]
        return self._replace(token_ids=self.token_ids[rows], mask=mask, temperatures=temperatures)


class Values(NamedTuple):
    """Per row, [N]; 0 where masked. While a chunk is in work, those of later chunks are not yet written."""

    log_probs: Tensor
    entropy: Tensor
    log_sum_exp: Tensor
    top1_ids: Tensor | None  # int64, -1 where masked; None: not wanted

    @classmethod
    def of(cls, hidden: Tensor, top1_ids: bool) -> Values:
        """Of hidden states [N, H] whose rows are all masked until they are written."""
        dtype = accumulation_dtype(hidden.dtype)
        log_probs, entropy, log_sum_exp = (hidden.new_zeros(len(hidden), dtype=dtype) for _ in range(3))
        likeliest = hidden.new_full((len(hidden),), -1, dtype=torch.int64) if top1_ids else None
        return cls(log_probs, entropy, log_sum_exp, likeliest)

    def write(self, rows: slice | Tensor, *results: Tensor | None) -> None:
        """Those of some of the rows, in order; what is not wanted is left out."""
        for value, result in zip(self, results, strict=True):
            if value is not None and result is not None:
                value[rows] = result.to(value.dtype)


class Slopes(NamedTuple):
    """Derivatives of the loss by the values of some rows; None is 0."""

    log_probs: Tensor
    entropy: Tensor | None = None
    log_sum_exp: Tensor | None = None

    def at(self, rows: slice | Tensor) -> Slopes:
        """Those of some of the rows."""
        entropy, log_sum_exp = (None if slope is None else slope[rows] for slope in self[1:])
        return Slopes(self.log_probs[rows], entropy, log_sum_exp)


def joined(first: Slopes, second: Slopes) -> Slopes:
    """Those of rows that follow each other."""
    count, more = len(first.log_probs), len(second.log_probs)

    def both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        if a is None and b is None:
            return None
        zero = first.log_probs.new_zeros
        return torch.cat([zero(count) if a is None else a, zero(more) if b is None else b])

    return Slopes(
        torch.cat([first.log_probs, second.log_probs]),
        both(first.entropy, second.entropy),
        both(first.log_sum_exp, second.log_sum_exp),
    )
