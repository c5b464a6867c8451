"""The grouped products on the CPU: one product through the BLAS for each expert that has rows."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from grpo_kernels.fp8_quantize import ops as fp8_ops
from grpo_kernels.fp8_quantize.layout import TILE
from grpo_kernels.grouped_gemm import ops
from grpo_kernels.grouped_gemm.arguments import segment_ends
from grpo_kernels.linear_log_probs.gemm import accumulation_dtype, multiply, without_autocast

_FEW_ROWS = 96


@functools.cache
def _fast(dtype: torch.dtype, few: bool) -> bool:
    """Whether this CPU multiplies operands of a half-width dtype, in float32 sums, faster than it widens and multiplies
    them. Measured: with AMX or instructions for float16 always, with those for bfloat16 where rows are few."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.float16:
        found: bool = torch.ops.mkldnn._is_mkldnn_fp16_supported()
        return found
    wide = torch.cpu._is_avx512_bf16_supported() and few
    return dtype == torch.bfloat16 and (torch.cpu._is_amx_tile_supported() or wide)


def _product(out: Tensor, a: Tensor, b: Tensor, rows: int) -> None:
    """out = a @ b of the segment of an expert, rounded once."""
    if out.dtype == a.dtype and _fast(a.dtype, rows <= _FEW_ROWS):
        torch.mm(a, b, out=out)
    else:
        multiply(out, a, b)


def _biased_product(out: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> None:
    """out = a @ b + bias, rounded once."""
    dtype = accumulation_dtype(a.dtype)
    exact = out if out.dtype == dtype else torch.empty_like(out, dtype=dtype)
    exact.copy_(bias)
    multiply(exact, a, b, add=True)
    if exact is not out:
        out.copy_(exact)


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
    end = 0
    for expert, rows in _segments("grouped_gemm", offsets, len(x)):
        end = rows.stop
        if rows.start == end:
            continue
        if bias is None:
            _product(out[rows], x[rows], weight[expert].t(), end - rows.start)
        else:
            _biased_product(out[rows], x[rows], weight[expert].t(), bias[expert])
    out[end:].zero_()
    return out


@without_autocast
def fp8_grouped_gemm(
    data: Tensor, scale: Tensor, weight_data: Tensor, weight_scale: Tensor, offsets: Tensor, out_dtype: torch.dtype
) -> Tensor:  # fmt: skip
    """Widens the rows and the weight of one expert at a time."""
    out = ops.empty_output(data, weight_data, out_dtype)
    end = 0
    for expert, rows in _segments("grouped_gemm", offsets, len(data)):
        end = rows.stop
        if rows.start < end:
            x = fp8_ops.fp8_dequantize(data[rows], scale[rows], torch.float32, "native")
            weight = fp8_ops.fp8_dequantize(weight_data[expert], weight_scale[expert], torch.float32, "native")
            multiply(out[rows], x, weight.t())
    out[end:].zero_()
    return out


@without_autocast
def grouped_gemm_wgrad(x: Tensor, grad: Tensor, offsets: Tensor, weight_dtype: torch.dtype) -> Tensor:
    result = ops.empty_weight_gradient(x, grad, offsets, weight_dtype)
    for expert, rows in _segments("grouped_gemm_wgrad", offsets, len(x)):
        if rows.start < rows.stop:
            _product(result[expert], grad[rows].t(), x[rows], rows.stop - rows.start)
        else:
            result[expert].zero_()
    return result


@without_autocast
def grouped_gemm_wgrad_add_(x: Tensor, grad: Tensor, offsets: Tensor, accumulator: Tensor) -> None:
    for expert, rows in _segments("grouped_gemm_wgrad_add_", offsets, len(x)):
        multiply(accumulator[expert], grad[rows].t(), x[rows], add=True)
    torch.autograd.graph.increment_version(accumulator)


def _whole_tiles(op: str, offsets: Tensor, rows: int) -> Iterator[tuple[int, slice, slice]]:
    """Every expert, its rows, and their tiles.

    Raises:
        ValueError: a segment does not consist of whole tiles.
    """
    for expert, segment in _segments(op, offsets, rows):
        for place, row in (("begin", segment.start), ("end", segment.stop)):
            if row % TILE and row != rows and segment.start < segment.stop:
                raise ValueError(
                    f"{op}: expert {expert} must {place} at a multiple of {TILE} or at R = {rows}, got {row}"
                )
        yield expert, segment, slice(segment.start // TILE, -(-segment.stop // TILE))


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
    for expert, rows in _segments("grouped_row_sum", offsets, len(grad)):
        torch.sum(grad[rows], 0, dtype=result.dtype, out=result[expert])
    return result
