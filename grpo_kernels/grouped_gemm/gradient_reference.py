"""Gradients of the grouped product's weights and biases in plain PyTorch, as ops that composed ones are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels._gemm import accumulation_dtype
from grpo_kernels.fp8_quantize import reference as fp8
from grpo_kernels.grouped_gemm.reference import segment_ends


def _members(offsets: Tensor, rows: int) -> Tensor:
    """[E, R] whether a row is of an expert."""
    ends = segment_ends(offsets, rows)
    starts = torch.cat((ends.new_zeros(1), ends[:-1]))
    row = torch.arange(rows, device=offsets.device)
    return (row >= starts[:, None]) & (row < ends[:, None])


def grouped_gemm_wgrad(x: Tensor, grad: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """[E, N, K]: grad[rows of e].T @ x[rows of e], formed in float32 (float64 for float64)."""
    exact = accumulation_dtype(x.dtype)
    x, grad = x.to(exact), grad.to(exact)
    members = _members(offsets, len(x))[..., None]
    found = [torch.where(own, grad, 0.0).t() @ torch.where(own, x, 0.0) for own in members]
    return torch.stack(found).to(dtype)


def fp8_grouped_gemm_wgrad(
    data: Tensor, scale: Tensor, grad_data: Tensor, grad_scale: Tensor, offsets: Tensor, dtype: torch.dtype
) -> Tensor:
    """The same of quantised transposes, x^T [K, R] and grad^T [N, R]."""
    x, grad = (fp8.fp8_dequantize(*pair, torch.float32).t() for pair in ((data, scale), (grad_data, grad_scale)))
    return grouped_gemm_wgrad(x, grad, offsets, dtype)


def grouped_row_sum(grad: Tensor, offsets: Tensor) -> Tensor:
    """[E, N] float32 (float64 for float64): the sum of the rows of each expert."""
    members, grad = _members(offsets, len(grad))[..., None], grad.to(accumulation_dtype(grad.dtype))
    return torch.stack([torch.where(own, grad, 0.0).sum(0) for own in members])
