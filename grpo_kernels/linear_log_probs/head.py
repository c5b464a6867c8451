"""The head as the kernels get it: weight, bias and LoRA factors, walked in slices of the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels._gemm import accumulation_dtype, multiply, wide

WORKSPACE_BYTES = 32 << 20
"""Most bytes of logits that exist at a time on the CPU, unless there are too many rows for slices of 256 columns."""


class LoRAFactors(NamedTuple):
    """A low-rank addition to the head: logits += scale * (hidden a^T) b^T. The merged weight is never formed.

    Args:
        a: [r, H] floating. Differentiable.
        b: [V, r] floating. Differentiable. With `vocab_shard` the rows of this rank.
        scale: the factor, usually alpha / r.
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0


class Head(NamedTuple):
    """The linear map from hidden states to logits; all tensors of one dtype."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    lora_a: Tensor | None  # [r, H]
    lora_b: Tensor | None  # [V, r]
    lora_scale: float

    def to(self, dtype: torch.dtype) -> Head:
        """The head in another dtype."""
        bias, a, b = (None if tensor is None else tensor.to(dtype) for tensor in self[1:4])
        return Head(self.weight.to(dtype), bias, a, b, self.lora_scale)

    def part(self, start: int, end: int) -> Head:
        """The rows start to end of the vocabulary, widened where the CPU's products need it."""
        return Head(
            wide(self.weight[start:end]),
            None if self.bias is None else wide(self.bias[start:end]),
            self.lora_a,
            None if self.lora_b is None else wide(self.lora_b[start:end]),
            self.lora_scale,
        )

    def project(self, hidden: Tensor) -> Tensor | None:
        """[N, r] hidden a^T in the accumulation dtype; None without LoRA."""
        if self.lora_a is None:
            return None
        projected = hidden.new_empty(
            (hidden.shape[0], self.lora_a.shape[0]), dtype=accumulation_dtype(self.lora_a.dtype)
        )
        multiply(projected, hidden, self.lora_a.t())
        return projected

    def logits(self, out: Tensor, hidden: Tensor, projected: Tensor | None) -> None:
        """Writes the logits [N, V] of this head, in the accumulation dtype."""
        if self.bias is None:
            multiply(out, hidden, self.weight.t())
        else:
            out.copy_(self.bias.expand_as(out))
            multiply(out, hidden, self.weight.t(), add=True)
        if projected is not None and self.lora_b is not None:
            multiply(out, projected, self.lora_b.t().to(projected.dtype), add=True, alpha=self.lora_scale)


def slices(rows: int, vocab: int, element_size: int, workspace: int | None = None) -> Iterator[tuple[int, int]]:
    """(start, end) of slices of the vocabulary, of about equal width, whose logits fill at most `workspace` bytes.

    The default is `WORKSPACE_BYTES`. All but the last have the same width. It is no multiple of 1024, where rows of
    logits would compete for the same places of the cache: products then take twice as long.
    """
    most = WORKSPACE_BYTES if workspace is None else workspace
    width = max(256, most // max(rows * element_size, 1))
    count = -(-vocab // width)
    width = -(-vocab // count)
    width = -(-width // 64) * 64
    if width % 1024 == 0 and width < vocab:
        width += 64
    for start in range(0, vocab, width):
        yield start, min(start + width, vocab)
