"""Where the rows of a logits tensor lie: what kernels can read, and overwrite, without a copy."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels._checks import position


class RowLayout(NamedTuple):
    """Row r starts at element (r // inner) * outer_stride + (r % inner) * inner_stride; its elements are neighbours."""

    rows: int
    inner: int
    outer_stride: int
    inner_stride: int


def row_layout(logits: Tensor) -> RowLayout | None:
    """The rows of [..., V] logits; None where the last axis is not dense or the others need more than two strides."""
    vocab = logits.shape[-1]
    rows = logits.numel() // vocab
    if logits.is_contiguous():
        return RowLayout(rows, max(rows, 1), 0, vocab)
    if logits.stride(-1) != 1 and vocab != 1:
        return None
    axes: list[tuple[int, int]] = []  # (size, stride), neighbours merged where one stride serves both
    for size, stride in zip(logits.shape[:-1], logits.stride()[:-1], strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1] == size * stride:
            axes[-1] = (axes[-1][0] * size, stride)
        else:
            axes.append((size, stride))
    if len(axes) > 2:
        return None
    inner_size, inner_stride = axes[-1] if axes else (1, vocab)
    return RowLayout(rows, max(inner_size, 1), axes[0][1] if len(axes) == 2 else 0, inner_stride)


def readable(logits: Tensor) -> tuple[Tensor, RowLayout]:
    """The logits, copied where no kernel can walk their rows, and their layout."""
    layout = row_layout(logits)
    if layout is None:
        logits = logits.contiguous()
        rows = logits.numel() // logits.shape[-1]
        layout = RowLayout(rows, max(rows, 1), 0, logits.shape[-1])
    return logits, layout


def overwritable(logits: Tensor) -> bool:
    """Whether each row can be replaced where it lies: no copy is needed and no two elements share their memory."""
    if logits.is_contiguous():
        return True
    layout = row_layout(logits)
    if layout is None:
        return False
    extent = logits.shape[-1]
    near, far = (layout.inner_stride, layout.inner), (layout.outer_stride, layout.rows // layout.inner)
    for stride, size in (far, near) if far[1] > 1 and far[0] < near[0] else (near, far):
        if size > 1 and stride < extent:
            return False
        extent += stride * (size - 1)
    return True


def raise_outside(op: str, token_ids: Tensor, row: int, vocab: int, name: str = "token_ids") -> None:
    """Names the token id of a live row that no vocabulary of this size holds."""
    where, value = position(name, token_ids.shape, row), token_ids.reshape(-1)[row].item()
    raise ValueError(f"{op}: {where} must be < V = {vocab}, or negative in a masked row, got {value}")


def dense(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Per-row values as kernels read them: one dense vector of `dtype`."""
    return values.to(dtype).contiguous()
