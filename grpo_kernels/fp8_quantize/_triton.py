"""Quantisation through Triton: the launchers."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from grpo_kernels._fp8_triton import TILE, encoding
from grpo_kernels._launch import on_device
from grpo_kernels.fp8_quantize._kernels_triton import (
    dequantize_kernel,
    launch_config,
    quantize_rows_kernel,
    quantize_tiles_kernel,
)
from grpo_kernels.fp8_quantize.layout import empty_dequantized, empty_quantized


def _matrices(values: Tensor) -> Tensor:
    """[B, M, K] values whose last axis is dense, copied where it is not."""
    values = values if values.stride(-1) == 1 or values.shape[-1] <= 1 else values.contiguous()
    return values if values.ndim == 3 else values[None]


def fp8_quantize(
    x: Tensor, square: bool, power_of_two: bool, rows: bool, columns: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if x.stride(-1) != 1 and x.stride(-2) == 1:  # the transpose of what lies dense in memory
        turned = fp8_quantize(x.mT, square, power_of_two, columns, rows, eps)
        return (*turned[2:], *turned[:2])
    data, scale, data_t, scale_t = out = empty_quantized(x, square, power_of_two, rows, columns, eps)
    if x.numel() == 0:
        return out
    x = _matrices(x)
    batches, height, width = x.shape
    config = launch_config(square, rows, columns)
    grid = (batches * triton.cdiv(height, config.rows) * triton.cdiv(width, config.columns),)
    options = {"POWER_OF_TWO": power_of_two, "ENCODE": encoding(x), "num_warps": config.num_warps}
    sizes = (height, width, x.stride(0), x.stride(1))
    with on_device(x):
        if not square and not columns:
            quantize_rows_kernel[grid](
                x,
                data.view(torch.uint8),
                scale,
                *sizes,
                data.stride(-2),
                scale.stride(-1),
                eps,
                ROWS=config.rows,
                **options,
            )
        else:
            quantize_tiles_kernel[grid](
                x,
                data.view(torch.uint8) if rows else None,
                scale if rows else None,
                data_t.view(torch.uint8) if columns else None,
                scale_t if columns else None,
                *sizes,
                data.stride(-2) if rows else 0,
                scale.stride(-1) if rows else 0,
                data_t.stride(-2) if columns else 0,
                scale_t.stride(-1) if columns else 0,
                eps,
                SQUARE=square,
                ON_ROWS=rows,
                ON_COLUMNS=columns,
                COLUMNS=config.columns,
                **options,
            )
    return out


def fp8_dequantize(data: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    out = empty_dequantized(data, scale, dtype)
    if out.numel() == 0:
        return out
    row_tiles, column_tiles = (scale.shape[axis] != data.shape[axis] for axis in (-2, -1))
    data, scale = _matrices(data.view(torch.uint8)), scale if scale.ndim == 3 else scale[None]
    batches, height, width = data.shape
    config = launch_config(False, True, False)
    grid = (batches * triton.cdiv(height, config.rows) * triton.cdiv(width, TILE),)
    with on_device(data):
        dequantize_kernel[grid](
            data,
            scale,
            out,
            height,
            width,
            data.stride(0),
            data.stride(1),
            *scale.stride(),
            ROW_TILES=row_tiles,
            COLUMN_TILES=column_tiles,
            ENCODE=encoding(data),
            ROWS=config.rows,
            num_warps=config.num_warps,
        )
    return out
