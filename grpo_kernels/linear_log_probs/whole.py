"""One pass on the CPU without chunks: the logits lie where the weight's gradient will.

That gradient has V H numbers. While it is not yet known, its memory holds the logits of as many as H rows: those of a
slice of the vocabulary, [n, S], lie where the slice's gradient, [S, H], will lie. Once the slice's products are formed,
they take the place of what they came from. So the products are as large as eager PyTorch's, and almost no memory is
needed above the results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels.linear_log_probs.gemm import accumulation_dtype, wide
from grpo_kernels.linear_log_probs.head import Head, part_ids
from grpo_kernels.linear_log_probs.partial import Part, Products
from grpo_kernels.linear_log_probs.row_values import Slopes, Targets, Values
from grpo_kernels.linear_log_probs.sums import Gradients, Needs
from grpo_kernels.token_log_probs import ops as row_ops
from grpo_kernels.token_log_probs.statistics import MAXIMUM, TOTAL, finish

_SLICE_BYTES = 16 << 20
"""Of the gradient of a slice's weight, which is formed beside the logits that it replaces."""
_BACKEND = "native"


def fits(rows: int, head: Head, needs: Needs, gradients: Gradients) -> bool:
    """Whether the weight's gradient has room for the logits of so many rows."""
    if not needs.weight:
        return False
    exact = accumulation_dtype(head.weight.dtype)
    return rows * exact.itemsize <= head.weight.shape[1] * gradients.weight.element_size()


class _Slice(NamedTuple):
    start: int
    end: int
    head: Head
    logits: Tensor  # [n, end - start]


def one_pass_within(
    hidden: Tensor,
    head: Head,
    targets: Targets,
    live: Tensor,
    slopes: Callable[[Values, int, int], Slopes],
    needs: Needs,
    gradients: Gradients,
) -> Values:
    """What `chunks.one_pass` does, for rows that `fits` allows."""
    exact = accumulation_dtype(hidden.dtype)
    rows: slice | Tensor = slice(0, len(hidden)) if bool(live.all()) else live.nonzero()[:, 0]
    x, targets = wide(hidden[rows]), targets.at(rows)
    projected = head.project(x)
    statistics = _statistics(head, x, projected, targets, gradients.weight)
    values = Values(*(hidden.new_zeros(len(hidden), dtype=exact) for _ in range(3)))
    everywhere = torch.ones(len(x), dtype=torch.bool)
    log_probs, entropy, _, _ = finish(statistics, None, None, everywhere, True)
    log_sum_exp = statistics[MAXIMUM] + statistics[TOTAL].log()
    for value, result in zip(values, (log_probs, entropy, log_sum_exp), strict=True):
        if result is not None:
            value[rows] = result.to(exact)
    found = slopes(values, 0, len(hidden)).at(rows)
    keep = torch.stack([slope != 0 for slope in found if slope is not None]).any(0)
    chosen = None if bool(keep.all()) else keep.nonzero()[:, 0]  # rows without a derivative take no product
    grad_hidden = _products(head, x, projected, targets, statistics.to(exact), found, chosen, needs, gradients)
    if grad_hidden is not None:
        if chosen is not None:
            rows = live.nonzero()[chosen, 0]
        if isinstance(rows, Tensor):
            gradients.hidden.zero_()
        gradients.hidden[rows] = grad_hidden.to(gradients.hidden.dtype)
    return values


def _statistics(head: Head, hidden: Tensor, projected: Tensor | None, targets: Targets, weight_grad: Tensor) -> Tensor:
    """[4, n] float64 statistics of the rows. Leaves their logits in the memory of `weight_grad`."""
    merged: Part | None = None
    for part in _slices(head, len(hidden), weight_grad):
        part.head.logits(part.logits, hidden, projected)
        own = targets._replace(token_ids=part_ids(targets.token_ids, part.start, part.end, 0))
        *_, statistics = row_ops.token_log_probs(part.logits, *own, True, False, False, True, _BACKEND)
        found = Part.of(part.start, part.end, targets.token_ids, statistics, None, None)
        merged = found if merged is None else merged.merged_with(found)
    if merged is None:
        raise RuntimeError("a vocabulary without tokens")
    return merged.values


def _products(
    head: Head,
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
    count = len(hidden)
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
        shares_memory=chosen is None,
    )
    for part in _slices(head, count, gradients.weight):
        grad = part.logits if chosen is None else part.logits[chosen]
        own = targets._replace(token_ids=part_ids(targets.token_ids, part.start, part.end, part.end - part.start))
        row_ops.token_log_probs_backward_(grad, *own, statistics, *slopes, _BACKEND)
        products.add(part.start, part.end, part.head, grad)
    return products.finish(head.lora_a)


def _slices(head: Head, rows: int, weight_grad: Tensor) -> Iterator[_Slice]:
    """Slices of the vocabulary, and the memory of their logits. What the memory holds stays there between walks."""
    vocab, width = head.weight.shape
    exact = accumulation_dtype(head.weight.dtype)
    flat = weight_grad.view(-1)
    step = max(256, _SLICE_BYTES // (width * exact.itemsize) // 64 * 64)
    for start in range(0, vocab, step):
        end = min(start + step, vocab)
        begin, size = start * width, rows * (end - start) * exact.itemsize // flat.element_size()
        logits = flat[begin : begin + size].view(exact).view(rows, end - start)
        yield _Slice(start, end, head.part(start, end), logits)
