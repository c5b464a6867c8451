"""The grouped products on the CPU: one product through the BLAS for each expert that has rows.

The products of small experts are shorter than it takes to wake the threads that share them. So each is one parallel
region, and what can be done for all experts at once is.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from grpo_kernels._gemm import multiply, without_autocast
from grpo_kernels.fp8_quantize import ops as fp8_ops
from grpo_kernels.fp8_quantize.layout import TILE
from grpo_kernels.grouped_gemm import ops
from grpo_kernels.grouped_gemm.arguments import segment_ends

_WORTH_WIDENING = 100
"""Multiplications for each element that widening reads or rounding writes, from which on it pays. Measured on two
cores with instructions for bfloat16, for experts of 360 x 720 to 1024 x 2048 and their gradients."""


@functools.cache
def _narrow(dtype: torch.dtype) -> str:
    """Where this CPU multiplies operands of a half-width dtype as they are, with float32 sums, faster than it widens
    and multiplies them: "always" with AMX, or with instructions for float16; with those for bfloat16, which are no
    faster than float32's everywhere, where the product is "small"; else "never"."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "never"
    if dtype == torch.float16:
        return "always" if torch.ops.mkldnn._is_mkldnn_fp16_supported() else "never"
    if torch.cpu._is_amx_tile_supported():
        return "always"
    return "small" if torch.cpu._is_avx512_bf16_supported() else "never"


def _as_it_is(dtype: torch.dtype, n: int, k: int, m: int) -> bool:
    """Whether [n, k] @ [k, m] is multiplied in that dtype. Follows from the dtype and these sizes alone."""
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    where = _narrow(dtype)
    return where == "always" or (where == "small" and n * k * m < _WORTH_WIDENING * (n * k + k * m + n * m))


def _product(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> None:
    """out = a @ b, or out += that, rounded once."""
    if out.dtype != a.dtype or not _as_it_is(a.dtype, a.shape[0], a.shape[1], b.shape[1]):
        multiply(out, a, b, add=add)
    elif add:
        torch.addmm(out, a, b, out=out)
    else:
        torch.mm(a, b, out=out)


def _sizes(op: str, offsets: Tensor, rows: int) -> list[int]:
    """Rows of every expert, then those of none."""
    ends = segment_ends(op, offsets, rows)
    return [end - start for start, end in zip([0, *ends], [*ends, rows], strict=True)]


def _biases(bias: Tensor, sizes: list[int], out: Tensor) -> Tensor:
    """Every row's bias, for sums to be added to: in `out`, or wider where that would round it."""
    dtype = torch.promote_types(out.dtype, bias.dtype)
    sums = out if out.dtype == dtype else torch.empty_like(out, dtype=dtype)
    experts = torch.repeat_interleave(torch.tensor(sizes[:-1]))
    torch.index_select(bias.to(dtype), 0, experts, out=sums[: len(experts)])
    return sums


@without_autocast
def grouped_gemm(
    x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:  # fmt: skip
    sizes = _sizes("grouped_gemm", offsets, len(x))
    out = ops.empty_output(x, weight, out_dtype)
    sums = out if bias is None else _biases(bias, sizes, out)
    segments, results = x.split_with_sizes(sizes), sums.split_with_sizes(sizes)
    for size, rows, expert, result in zip(sizes, segments, weight.transpose(1, 2).unbind(0), results, strict=False):
        if size > 0:
            _product(result, rows, expert, add=bias is not None)
    if sums is not out:
        out.copy_(sums)
    out[len(x) - sizes[-1] :].zero_()
    return out


def _gradient_products(x: Tensor, grad: Tensor, sizes: list[int], weights: Tensor) -> zip[tuple[Any, ...]]:
    """Of every expert: its rows' number, the columns of their gradients, the rows, and what their product is for."""
    columns, rows = grad.t().split_with_sizes(sizes, 1), x.split_with_sizes(sizes)
    return zip(sizes, columns, rows, weights.unbind(0), strict=False)


@without_autocast
def fp8_grouped_gemm(
    data: Tensor,
    scale: Tensor,
    weight_data: Tensor,
    weight_scale: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Widens the rows and the weight of one expert at a time."""
    biases = [None] * len(offsets) if bias is None else list(bias.float().unbind())
    sizes = _sizes("grouped_gemm", offsets, len(data))
    out = ops.empty_output(data, weight_data, out_dtype)
    segments = (data.split_with_sizes(sizes), scale.split_with_sizes(sizes), out.split_with_sizes(sizes))
    for size, rows, of_rows, result, expert, of_expert, added in zip(
        sizes, *segments, weight_data.unbind(0), weight_scale.unbind(0), biases, strict=False
    ):
        if size > 0:
            x = fp8_ops.fp8_dequantize(rows, of_rows, torch.float32, "native")
            weight = fp8_ops.fp8_dequantize(expert, of_expert, torch.float32, "native")
            if added is None:
                multiply(result, x, weight.t())
            else:  # not into the bias: parts of a sum would be added to it one by one
                torch.add(torch.mm(x, weight.t()), added, out=result)
    out[len(data) - sizes[-1] :].zero_()
    return out


@without_autocast
def grouped_gemm_wgrad(x: Tensor, grad: Tensor, offsets: Tensor, weight_dtype: torch.dtype) -> Tensor:
    result = ops.empty_weight_gradient(x, grad, offsets, weight_dtype)
    sizes = _sizes("grouped_gemm_wgrad", offsets, len(x))
    for size, columns, rows, weight in _gradient_products(x, grad, sizes, result):
        if size > 0:
            _product(weight, columns, rows)
        else:
            weight.zero_()
    return result


@without_autocast
def grouped_gemm_wgrad_add_(x: Tensor, grad: Tensor, offsets: Tensor, accumulator: Tensor) -> None:
    sizes = _sizes("grouped_gemm_wgrad_add_", offsets, len(x))
    for size, columns, rows, weight in _gradient_products(x, grad, sizes, accumulator):
        if size > 0:
            multiply(weight, columns, rows, add=True)
    torch.autograd.graph.increment_version(accumulator)


def _whole_tiles(op: str, offsets: Tensor, rows: int) -> Iterator[tuple[int, slice, slice]]:
    """Every expert, its rows, and their tiles.

    Raises:
        ValueError: a segment does not consist of whole tiles.
    """
    ends = segment_ends(op, offsets, rows)
    for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        for place, row in (("begin", start), ("end", end)):
            if row % TILE and row != rows and start < end:
                raise ValueError(
                    f"{op}: expert {expert} must {place} at a multiple of {TILE} or at R = {rows}, got {row}"
                )
        yield expert, slice(start, end), slice(start // TILE, -(-end // TILE))


def _wide_pair(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor], segment: slice, tiles: slice
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The rows of an expert in float32: grad^T [N, r] and x [r, K]."""
    data, scale, grad_data, grad_scale = tensors
    x = fp8_ops.fp8_dequantize(data[:, segment], scale[:, tiles], torch.float32, "native")
    return fp8_ops.fp8_dequantize(grad_data[:, segment], grad_scale[:, tiles], torch.float32, "native"), x.t()


@without_autocast
def fp8_grouped_gemm_wgrad(
    data: Tensor, scale: Tensor, grad_data: Tensor, grad_scale: Tensor, offsets: Tensor, weight_dtype: torch.dtype
) -> Tensor:  # fmt: skip
    result = ops.empty_weight_gradient(data.t(), grad_data.t(), offsets, weight_dtype).zero_()
    for expert, segment, tiles in _whole_tiles("fp8_grouped_gemm_wgrad", offsets, data.shape[1]):
        if segment.start < segment.stop:
            multiply(result[expert], *_wide_pair((data, scale, grad_data, grad_scale), segment, tiles))
    return result


@without_autocast
def fp8_grouped_gemm_wgrad_add_(
    data: Tensor, scale: Tensor, grad_data: Tensor, grad_scale: Tensor, offsets: Tensor, accumulator: Tensor
) -> None:  # fmt: skip
    for expert, segment, tiles in _whole_tiles("fp8_grouped_gemm_wgrad_add_", offsets, data.shape[1]):
        if segment.start < segment.stop:
            pair = _wide_pair((data, scale, grad_data, grad_scale), segment, tiles)
            multiply(accumulator[expert], *pair, add=True)
    torch.autograd.graph.increment_version(accumulator)


def grouped_row_sum(grad: Tensor, offsets: Tensor) -> Tensor:
    result = ops.empty_row_sum(grad, offsets)
    sizes = _sizes("grouped_row_sum", offsets, len(grad))
    for rows, expert in zip(grad.split_with_sizes(sizes), result.unbind(0), strict=False):
        torch.sum(rows, 0, dtype=result.dtype, out=expert)
    return result
