"""The grouped products on the CPU: one product through the BLAS for each expert that has rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from grpo_kernels.grouped_gemm import ops
from grpo_kernels.grouped_gemm.arguments import segment_ends
from grpo_kernels.linear_log_probs.gemm import accumulation_dtype, multiply, without_autocast


def _segments(op: str, offsets: Tensor, rows: int) -> Iterator[tuple[int, slice]]:
    """Every expert, and its rows."""
    start = 0
    for expert, end in enumerate(segment_ends(op, offsets, rows)):
        yield expert, slice(start, end)
        start = end


@without_autocast
def grouped_gemm(
    x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:  # fmt: skip
    out = ops.empty_output(x, weight, out_dtype)
    exact = accumulation_dtype(x.dtype)
    end = 0
    for expert, rows in _segments("grouped_gemm", offsets, len(x)):
        end = rows.stop
        if rows.start == end:
            continue
        if bias is None:
            multiply(out[rows], x[rows], weight[expert].t())
        else:
            product = x.new_empty((rows.stop - rows.start, out.shape[1]), dtype=exact)
            product.copy_(bias[expert].expand_as(product))
            multiply(product, x[rows], weight[expert].t(), add=True)
            out[rows] = product
    out[end:].zero_()
    return out


@without_autocast
def grouped_gemm_wgrad(
    x: Tensor, grad: Tensor, offsets: Tensor, accumulator: Tensor | None, weight_dtype: torch.dtype
) -> Tensor:
    result = ops.empty_weight_gradient(x, grad, offsets, accumulator, weight_dtype)
    target = result if accumulator is None else accumulator
    for expert, rows in _segments("grouped_gemm_wgrad", offsets, len(x)):
        if rows.start < rows.stop:
            multiply(target[expert], grad[rows].t(), x[rows], add=accumulator is not None)
        elif accumulator is None:
            target[expert].zero_()
    if accumulator is not None:
        torch.autograd.graph.increment_version(accumulator)
    return result


def grouped_row_sum(grad: Tensor, offsets: Tensor) -> Tensor:
    result = ops.empty_row_sum(grad, offsets)
    for expert, rows in _segments("grouped_row_sum", offsets, len(grad)):
        torch.sum(grad[rows], 0, dtype=result.dtype, out=result[expert])
    return result
