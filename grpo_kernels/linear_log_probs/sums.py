"""Gradients of hidden states and head from those of the logits, summed over chunks of rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels._gemm import accumulation_dtype, multiply, wide
from grpo_kernels.linear_log_probs.head import Head, slices


class Needs(NamedTuple):
    """The gradients that are wanted."""

    hidden: bool
    weight: bool
    bias: bool
    lora: bool


class Gradients(NamedTuple):
    """Where they are written; empty where not wanted. The first two have any dtype, the others the exact one."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    lora_a: Tensor
    lora_b: Tensor


def parts(head: Head) -> Iterator[tuple[int, int]]:
    """Slices of the vocabulary: the whole, unless products need the weight widened."""
    vocab, width = head.weight.shape
    if wide(head.weight[:1]).dtype == head.weight.dtype:
        yield 0, vocab
    else:
        yield from slices(width, vocab, 4)


class Sums:
    """Takes the gradients of the logits chunk by chunk, and writes `gradients`.

    The weight's is accumulated in float32. Where that takes a buffer of its own, larger than the gradients of all
    logits in the dtype of the products, these are kept instead, and one product at the end forms it.
    """

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        live: Tensor,
        needs: Needs,
        gradients: Gradients,
        chunks: int,
        compact: bool,
    ) -> None:
        self.hidden, self.head, self.live = hidden, head, live
        self.needs, self.gradients = needs, gradients
        self.exact = accumulation_dtype(hidden.dtype)
        self.weight = gradients.weight
        self.kept: Tensor | None = None
        vocab, width = head.weight.shape
        if needs.weight and chunks > 1 and self.weight.dtype != self.exact:
            if not compact and hidden.element_size() * len(hidden) < self.exact.itemsize * width:
                self.kept = hidden.new_empty(len(hidden), vocab)
            else:
                self.weight = self.weight.new_empty(self.weight.shape, dtype=self.exact)
        self.started = False
        if compact and needs.hidden:
            gradients.hidden.zero_()

    def add(self, rows: slice | Tensor, hidden: Tensor, projected: Tensor | None, grad: Tensor) -> None:
        """`grad` [n, V] is the gradient of the logits of `rows`, whose hidden states are `hidden`."""
        needs, sums, add = self.needs, self.gradients, self.started
        self.started = True
        through = self._add_hidden(rows, projected, grad)
        if self.kept is not None:
            self.kept[rows] = grad
        elif needs.weight:
            multiply(self.weight, grad.t(), hidden, add=add)
        if needs.bias:
            total = grad.sum(0, dtype=self.exact)
            sums.bias.add_(total) if add else sums.bias.copy_(total)
        if needs.lora and through is not None and projected is not None:
            multiply(sums.lora_a, through.t(), hidden, add=add)
            multiply(sums.lora_b, grad.t(), projected.to(grad.dtype), add=add, alpha=self.head.lora_scale)

    def _add_hidden(self, rows: slice | Tensor, projected: Tensor | None, grad: Tensor) -> Tensor | None:
        """Returns the gradient of the projected hidden states."""
        needs, head = self.needs, self.head
        if not needs.hidden and (projected is None or not needs.lora):
            return None
        width = head.weight.shape[1]
        total = grad.new_empty(len(grad), width, dtype=self.exact) if needs.hidden else None
        through = None if projected is None else torch.empty_like(projected)
        for start, end in parts(head):
            part, piece = head.part(start, end), grad[:, start:end]
            if total is not None:
                multiply(total, piece, part.weight, add=start > 0)
            if through is not None and part.lora_b is not None:
                multiply(through, piece, part.lora_b, add=start > 0, alpha=head.lora_scale)
        through = None if through is None else through.to(grad.dtype)
        if total is not None:
            if through is not None and head.lora_a is not None:
                multiply(total, through, head.lora_a, add=True)
            self.gradients.hidden[rows] = total.to(self.gradients.hidden.dtype)
        return through

    def finish(self) -> None:
        """Writes what is still open."""
        if not self.started:
            for gradient in self.gradients:
                gradient.zero_()
        elif self.kept is not None:
            live_hidden = torch.where(self.live[:, None], self.hidden, 0)
            multiply(self.gradients.weight, self.kept.t(), live_hidden)
        elif self.weight is not self.gradients.weight:
            self.gradients.weight.copy_(self.weight)
