"""One pass on the CPU without chunks: the logits lie where the weight's gradient will.

That gradient has V H numbers. While it is not yet known, its memory holds the logits of as many as H rows, in slices of
the vocabulary: those of slice i, [n, S], lie where the gradient of slice i - 1, [S, H], will lie; only the first have
memory of their own. From the last slice to the first, each gradient then goes where the logits that lay there have been
used. So the products are as large as eager PyTorch's, and almost no memory is needed above the results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from grpo_kernels._gemm import accumulation_dtype, wide
from grpo_kernels._token_ids import part_ids
from grpo_kernels.linear_log_probs.head import Head, slices
from grpo_kernels.linear_log_probs.partial import Part, Products, Slice
from grpo_kernels.linear_log_probs.row_values import Slopes, Targets, Values
from grpo_kernels.linear_log_probs.sums import Gradients, Needs
from grpo_kernels.token_log_probs import ops as row_ops
from grpo_kernels.token_log_probs.statistics import MAXIMUM, TOTAL

_SLICE_BYTES = (16 << 20, 64 << 20)
"""Least and most for the logits of a slice; between them an eighth of all."""
_BACKEND = "native"


def fits(rows: int, head: Head, needs: Needs, gradients: Gradients) -> bool:
    """Whether the weight's gradient has room for the logits of so many rows."""
    if not needs.weight:
        return False
    exact = accumulation_dtype(head.weight.dtype)
    return rows * exact.itemsize <= head.weight.shape[1] * gradients.weight.element_size()


def one_pass_within(
    hidden: Tensor,
    head: Head,
    targets: Targets,
    live: Tensor,
    slopes: Callable[[Values, int, int], Slopes],
    needs: Needs,
    gradients: Gradients,
    top1_ids: bool,
) -> Values:
    """What `chunks.one_pass` does, for rows that `fits` allows."""
    exact = accumulation_dtype(hidden.dtype)
    rows: slice | Tensor = slice(0, len(hidden)) if bool(live.all()) else live.nonzero()[:, 0]
    x, targets = wide(hidden[rows]), targets.at(rows)
    projected = head.project(x)
    memory = _Memory(head, len(x), gradients.weight)
    found_rows = _statistics(memory, x, projected, targets, top1_ids)
    statistics = found_rows.values
    values = Values.of(hidden, top1_ids)
    log_probs, entropy, _, likeliest = found_rows.finished(True)
    values.write(rows, log_probs, entropy, statistics[MAXIMUM] + statistics[TOTAL].log(), likeliest)
    found = slopes(values, 0, len(hidden)).at(rows)
    keep = torch.stack([slope != 0 for slope in found if slope is not None]).any(0)
    chosen = None if bool(keep.all()) else keep.nonzero()[:, 0]  # rows without a derivative take no product
    grad_hidden = _products(memory, x, projected, targets, statistics.to(exact), found, chosen, needs, gradients)
    if grad_hidden is not None:
        if chosen is not None:
            rows = live.nonzero()[chosen, 0]
        if isinstance(rows, Tensor):
            gradients.hidden.zero_()
        gradients.hidden[rows] = grad_hidden.to(gradients.hidden.dtype)
    return values


def _statistics(memory: _Memory, hidden: Tensor, projected: Tensor | None, targets: Targets, top1_ids: bool) -> Part:
    """Of the whole vocabulary, without squares. Leaves their logits in the memory."""
    merged: Part | None = None
    for part in memory.slices(backward=False):
        part.head.logits(part.logits, hidden, projected)
        own = targets._replace(token_ids=part_ids(targets.token_ids, part.start, part.end, 0))
        log_probs, _, _, likeliest, statistics = row_ops.token_log_probs(
            part.logits, *own, True, False, top1_ids, True, _BACKEND
        )
        top1 = likeliest if top1_ids else None
        found = Part.of(part.start, part.end, targets.token_ids, log_probs, statistics, None, top1)
        merged = found if merged is None else merged.merged_with(found)
    if merged is None:
        raise RuntimeError("a vocabulary without tokens")
    return merged


def _products(
    memory: _Memory,
    hidden: Tensor,
    projected: Tensor | None,
    targets: Targets,
    statistics: Tensor,
    slopes: Slopes,
    chosen: Tensor | None,
    needs: Needs,
    gradients: Gradients,
) -> Tensor | None:
    """Turns the logits into all gradients but that of the hidden states, which it returns, of the `chosen` rows."""
    head = memory.head
    if chosen is not None:
        hidden, targets, slopes = hidden[chosen], targets.at(chosen), slopes.at(chosen)
        statistics, projected = statistics[:, chosen], None if projected is None else projected[chosen]
    products = Products(
        hidden,
        projected,
        head.lora_scale,
        need_hidden=needs.hidden,
        weight=gradients.weight,
        bias=gradients.bias if needs.bias else None,
        lora_a=gradients.lora_a if needs.lora else None,
        lora_b=gradients.lora_b if needs.lora else None,
    )
    for part in memory.slices(backward=True):
        grad = part.logits if chosen is None else part.logits[chosen]
        own = targets._replace(token_ids=part_ids(targets.token_ids, part.start, part.end, part.end - part.start))
        row_ops.token_log_probs_backward_(grad, *own, statistics, *slopes, _BACKEND)
        products.add(part.start, part.end, part.head, grad)
    return products.finish(head.lora_a)


class _Memory:
    """Where the logits of the slices are."""

    def __init__(self, head: Head, rows: int, weight_grad: Tensor) -> None:
        vocab, self.width = head.weight.shape
        self.head, self.rows = head, rows
        self.exact = accumulation_dtype(head.weight.dtype)
        self.weight_grad = weight_grad.view(-1)
        least, most = _SLICE_BYTES
        workspace = min(most, max(least, rows * vocab * self.exact.itemsize // 8))
        self.parts = list(slices(rows, vocab, self.exact.itemsize, workspace))
        self.first = weight_grad.new_empty(rows * self.parts[0][1], dtype=self.exact)

    def slices(self, *, backward: bool) -> Iterator[Slice]:
        """All slices. What their memory holds stays there between walks."""
        order = range(len(self.parts))
        for index in reversed(order) if backward else order:
            start, end = self.parts[index]
            size = self.rows * (end - start)
            memory = self.first
            if index > 0:
                begin = self.parts[index - 1][0] * self.width
                memory = self.weight_grad[begin : begin + size * self.exact.itemsize // self.weight_grad.element_size()]
            logits = memory.view(self.exact)[:size].view(self.rows, end - start)
            yield Slice(start, end, self.head.part(start, end), logits)
