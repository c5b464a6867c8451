"""The CPU's way through a vocabulary: statistics and gradients slice by slice."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels._gemm import multiply, wide
from grpo_kernels.linear_log_probs.head import Head
from grpo_kernels.token_log_probs.statistics import ABSENT, MAXIMUM, TARGET, TOTAL, finish, merge


class Slice(NamedTuple):
    """Logits of rows for a part of the vocabulary."""

    start: int
    end: int
    head: Head  # of this part
    logits: Tensor  # [n, end - start]


class Part(NamedTuple):
    """What `merge` takes of a slice of the vocabulary; in float64, so that hundreds of slices add nothing to the
    rounding of one."""

    values: Tensor  # [4, n]
    squared: Tensor | None  # [n]
    top1_ids: Tensor | None  # [n]

    @classmethod
    def of(
        cls,
        start: int,
        end: int,
        token_ids: Tensor,
        log_probs: Tensor,
        values: Tensor,
        sum_squared_probs: Tensor | None,
        top1_ids: Tensor | None,
    ) -> Part:
        """From what the row kernels give for the slice [start, end); the ids are those of the whole vocabulary.

        The target's z is the one that the log-probs within the slice belong to: that of the statistics is rounded to
        their dtype by itself, and its difference to the maximum, which is what counts, with it.
        """
        values = values.double()
        target = values[MAXIMUM] + values[TOTAL].log() + log_probs.double()
        values[TARGET] = torch.where(values[TOTAL] > 0, target, values[TARGET])  # no sum, no log-prob
        values[TARGET].masked_fill_((token_ids < start) | (token_ids >= end), ABSENT)
        squared = top1 = None
        if sum_squared_probs is not None:
            total = values[TOTAL]
            squared = torch.where(total == 0, 0.0, sum_squared_probs.double() * total * total)
        if top1_ids is not None:
            top1 = torch.where(top1_ids < 0, top1_ids, top1_ids + start)
        return cls(values, squared, top1)

    def merged_with(self, other: Part) -> Part:
        """The statistics of both slices together."""
        values, squared, top1 = (
            torch.stack([a, b]) if a is not None and b is not None else None for a, b in zip(self, other, strict=True)
        )
        return self if values is None else Part(*merge(values, squared, top1))

    def finished(self, entropy: bool) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Log-probs, entropy, sums of squared probabilities and top-1 ids of rows of which all count.

        A log-prob that was put together from the target's z may miss 0 by a rounding in float64; it is not above.
        """
        everywhere = torch.ones(self.values.shape[1], dtype=torch.bool)
        log_probs, entropies, squared, top1_ids = finish(self.values, self.squared, self.top1_ids, everywhere, entropy)
        return log_probs.clamp(max=0.0), entropies, squared, top1_ids


class Products:
    """The gradients of hidden states and head from those of the logits, slice by slice.

    Args:
        hidden: [n, H]. The rows, widened.
        projected: [n, r] hidden a^T; None without LoRA.
        scale: of the LoRA factors.
        need_hidden: whether the gradient of the hidden states is wanted.
        weight: [V, H]. Where the weight's gradient goes; None: not wanted.
        bias: [V]. Likewise.
        lora_a: [r, H]. Likewise.
        lora_b: [V, r]. Likewise.
        accumulate: add to `weight`, not overwrite it.
    """

    def __init__(
        self,
        hidden: Tensor,
        projected: Tensor | None,
        scale: float,
        *,
        need_hidden: bool,
        weight: Tensor | None,
        bias: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        accumulate: bool = False,
    ) -> None:
        self._hidden, self._projected, self._scale = hidden, projected, scale
        self._weight, self._bias, self._lora_a, self._lora_b = weight, bias, lora_a, lora_b
        self._accumulate = accumulate
        self._sums = torch.zeros_like(hidden) if need_hidden else None
        wanted = need_hidden or lora_a is not None
        self._through = torch.zeros_like(projected) if projected is not None and wanted else None

    def add(self, start: int, end: int, head: Head, grad: Tensor) -> None:
        """Adds those of the slice [start, end) of the vocabulary, which `head` is of. grad: [n, end - start]."""
        if self._sums is not None:
            multiply(self._sums, grad, head.weight, add=True)
        if self._bias is not None:
            torch.sum(grad, 0, out=self._bias[start:end])
        if self._through is not None and head.lora_b is not None:
            multiply(self._through, grad, head.lora_b, add=True, alpha=self._scale)
        if self._lora_b is not None and self._projected is not None:
            multiply(self._lora_b[start:end], grad.t(), self._projected, alpha=self._scale)
        if self._weight is not None:
            multiply(self._weight[start:end], grad.t(), self._hidden, add=self._accumulate)

    def finish(self, lora_a: Tensor | None) -> Tensor | None:
        """[n, H] gradient of the hidden states, if wanted. Writes what takes all slices; `lora_a` is the factor."""
        if self._through is not None and lora_a is not None:
            if self._lora_a is not None:
                multiply(self._lora_a, self._through.t(), self._hidden)
            if self._sums is not None:
                multiply(self._sums, self._through, wide(lora_a), add=True)
        return self._sums
