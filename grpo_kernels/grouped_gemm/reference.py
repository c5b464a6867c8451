"""The grouped product in plain PyTorch: the definition, the oracle in float64, and the fallback on any device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def segment_ends(offsets: Tensor, rows: int) -> Tensor:
    """[E] int64. End row of every expert's segment. An offset below the one before it ends an empty segment, one
    beyond the last row ends at that row: whatever the offsets hold, segments lie inside and do not overlap."""
    return offsets.detach().to(torch.int64).clamp(0, rows).cummax(0).values


def grouped_gemm(
    x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:  # fmt: skip
    """[R, N]. Row r of expert e is x[r] @ weight[e].T + bias[e], formed in float32 (float64 for float64); rows of no
    expert are 0.

    Args:
        x: [R, K], of one dtype with the others.
        weight: [E, N, K].
        offsets: [E] int. End rows.
        bias: [E, N].
    """
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    ends = segment_ends(offsets, x.shape[0])
    readable = x.device.type == "cpu" and not torch.compiler.is_compiling()
    biases = [None] * len(weight) if bias is None else list(bias.to(exact).unbind())
    experts = zip(weight.to(exact).unbind(), biases, strict=True)
    results = (_by_segments if readable else _by_masks)(x.to(exact), experts, ends, weight.shape[1])
    return results.to(out_dtype)


def fp8_grouped_gemm(
    data: Tensor,
    scale: Tensor,
    weight_data: Tensor,
    weight_scale: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """[R, N]. The product of what the operands stand for, formed in float32, and the bias.

    Args:
        data: [R, K] e4m3.
        scale: [R, K/128] float32. Of 1 x 128 numbers.
        weight_data: [E, N, K] e4m3.
        weight_scale: [E, N/128, K/128] float32. Of 128 x 128 numbers.
        offsets: [E] int. End rows.
        bias: [E, N] of any floating dtype.
    """
    columns, width = weight_data.shape[1:]
    x = data.float() * scale.repeat_interleave(128, 1)[:, :width]
    of_rows = weight_scale.repeat_interleave(128, 1)[:, :columns]
    weight = weight_data.float() * of_rows.repeat_interleave(128, 2)[..., :width]
    return grouped_gemm(x, weight, offsets, bias, out_dtype)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product = x @ weight.t()
    return product if bias is None else product + bias


def _by_segments(
    x: Tensor, experts: Iterator[tuple[Tensor, Tensor | None]], ends: Tensor, columns: int
) -> Tensor:  # fmt: skip
    """Where the offsets may be read."""
    parts, start = [], 0
    for (weight, bias), end in zip(experts, ends.tolist(), strict=True):
        parts.append(_linear(x[start:end], weight, bias))
        start = end
    return torch.cat([*parts, x.new_zeros(x.shape[0] - start, columns)])


def _by_masks(
    x: Tensor, experts: Iterator[tuple[Tensor, Tensor | None]], ends: Tensor, columns: int
) -> Tensor:  # fmt: skip
    """Where they may not: every expert multiplies all rows, those of others as zeros."""
    row = torch.arange(x.shape[0], device=x.device)
    expert_of_row = (row[:, None] >= ends).sum(1)[:, None]
    results = x.new_zeros(x.shape[0], columns)
    for expert, (weight, bias) in enumerate(experts):
        own = expert_of_row == expert
        results = torch.where(own, _linear(torch.where(own, x, 0), weight, bias), results)
    return results
