"""The grouped products through Triton: the launchers."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from grpo_kernels._gemm import without_autocast
from grpo_kernels._launch import TILE, Matrix, architecture, loads, matrix, precision, programs, run
from grpo_kernels.grouped_gemm import _library_triton as library
from grpo_kernels.grouped_gemm import ops
from grpo_kernels.grouped_gemm._config_triton import launch_config, segments, wgrad_config
from grpo_kernels.grouped_gemm._fp8_triton import fp8_grouped_gemm
from grpo_kernels.grouped_gemm._fp8_wgrad_triton import fp8_grouped_gemm_wgrad, fp8_grouped_gemm_wgrad_add_
from grpo_kernels.grouped_gemm._kernels_triton import grouped_kernel, row_sum_kernel, wgrad_kernel

__all__ = [
    "fp8_grouped_gemm",
    "fp8_grouped_gemm_wgrad",
    "fp8_grouped_gemm_wgrad_add_",
    "grouped_gemm",
    "grouped_gemm_wgrad",
    "grouped_gemm_wgrad_add_",
    "grouped_row_sum",
]


def _dense(weight: Tensor) -> bool:
    """Whether the rows of every expert's matrix are dense and, as all matrices, do not overlap."""
    experts, rows, width = weight.shape
    apart = rows == 1 or width <= weight.stride(1) < 2**31 // TILE
    return (width == 1 or weight.stride(2) == 1) and apart and (experts == 1 or weight.stride(0) > 0)


def _weights(weight: Tensor) -> tuple[Matrix, bool]:
    """The weights as matrices, and whether their second axis is the dense one."""
    turned = not _dense(weight) and _dense(weight.transpose(1, 2))
    matrices = weight.transpose(1, 2) if turned else weight
    if not turned and not _dense(weight):
        matrices = matrices.contiguous()
    experts, rows, width = matrices.shape
    stride = matrices.stride(1) if rows > 1 else width
    return Matrix(matrices, stride, width, matrices.stride(0) if experts > 1 else rows * stride), turned


@without_autocast
def grouped_gemm(
    x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:  # fmt: skip
    out = ops.empty_output(x, weight, out_dtype)
    experts, columns, width = weight.shape
    rows = x.shape[0]
    if rows == 0:
        return out
    if bias is None and library.suits(x, weight, experts, out_dtype):
        return library.grouped_gemm(x, weight, offsets)
    target = architecture(x)
    left, (right, turned) = matrix(x), _weights(weight)
    way = loads(target, left, right)
    config = launch_config(rows, experts, width, x.element_size(), target, way)
    row_blocks = triton.cdiv(rows, config.block_m) + min(experts + 1, rows)
    grid = programs(x, row_blocks * triton.cdiv(columns, config.block_n), config.on_each)

    def launch() -> None:
        grouped_kernel[(grid,)](
            left.tensor,
            right.tensor,
            offsets.contiguous(),
            None if bias is None else bias.contiguous(),
            out,
            rows,
            columns,
            width,
            experts,
            left.stride,
            right.matrix_stride,
            1 if turned else right.stride,
            right.stride if turned else 1,
            config.group,
            LOADS=way,
            TURNED=turned,
            HAS_BIAS=bias is not None,
            PRECISION=precision(x.dtype),
            SEGMENTS=segments(experts),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            PIECES=config.pieces,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )

    run(x, launch)
    return out


@without_autocast
def grouped_gemm_wgrad(x: Tensor, grad: Tensor, offsets: Tensor, weight_dtype: torch.dtype) -> Tensor:
    if library.suits(x, grad, len(offsets), weight_dtype):
        return library.grouped_gemm_wgrad(x, grad, offsets)
    result = ops.empty_weight_gradient(x, grad, offsets, weight_dtype)
    _wgrad(x, grad, offsets, result, accumulate=False)
    return result


@without_autocast
def grouped_gemm_wgrad_add_(x: Tensor, grad: Tensor, offsets: Tensor, accumulator: Tensor) -> None:
    if accumulator.stride(2) != 1 and accumulator.stride(1) == 1:
        _wgrad(grad, x, offsets, accumulator.transpose(1, 2), accumulate=True)
    else:
        _wgrad(x, grad, offsets, accumulator, accumulate=True)
    torch.autograd.graph.increment_version(accumulator)


def _wgrad(x: Tensor, grad: Tensor, offsets: Tensor, out: Tensor, *, accumulate: bool) -> None:
    """Writes, or adds to, `out` [E, N, K], whose last axis is dense."""
    experts, columns, width = out.shape
    rows = x.shape[0]
    if rows == 0:
        if not accumulate:
            out.zero_()
        return
    left, right = matrix(grad), matrix(x)
    target = architecture(x)
    way = loads(target, left, right)
    config = wgrad_config(rows, experts, x.element_size(), target, way)
    items = experts * triton.cdiv(columns, config.block_m) * triton.cdiv(width, config.block_n)
    grid = programs(x, items, config.on_each)

    def launch() -> None:
        wgrad_kernel[(grid,)](
            right.tensor,
            left.tensor,
            offsets.contiguous(),
            out,
            rows,
            columns,
            width,
            experts,
            right.stride,
            left.stride,
            out.stride(0),
            out.stride(1),
            LOADS=way,
            ACCUMULATE=accumulate,
            PRECISION=precision(x.dtype),
            SEGMENTS=segments(experts),
            BLOCK_N=config.block_m,
            BLOCK_K=config.block_n,
            BLOCK_R=config.block_k,
            PIECES=config.pieces,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )

    run(x, launch)


_SUMMED_ROWS, _SUMMED_COLUMNS = 32, 64


def grouped_row_sum(grad: Tensor, offsets: Tensor) -> Tensor:
    out = ops.empty_row_sum(grad, offsets)
    experts, columns = out.shape
    rows = matrix(grad)

    def launch() -> None:
        row_sum_kernel[(experts, triton.cdiv(columns, _SUMMED_COLUMNS))](
            rows.tensor,
            offsets.contiguous(),
            out,
            grad.shape[0],
            columns,
            experts,
            rows.stride,
            SEGMENTS=segments(experts),
            BLOCK_R=_SUMMED_ROWS,
            BLOCK_N=_SUMMED_COLUMNS,
            num_warps=4,
        )

    run(grad, launch)
    return out
