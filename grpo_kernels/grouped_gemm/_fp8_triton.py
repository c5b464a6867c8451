"""The product of FP8 operands through Triton: the launcher."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from grpo_kernels._extension import pointer
from grpo_kernels._launch import architecture, precision, programs, run
from grpo_kernels.fp8_quantize import ops as fp8_ops
from grpo_kernels.fp8_quantize.layout import aligned, empty_data
from grpo_kernels.grouped_gemm import ops
from grpo_kernels.grouped_gemm._config_triton import PANEL, segments
from grpo_kernels.grouped_gemm._fp8_config_triton import HARDWARE, TABLE_BLOCK, TILE, launch_config, row_tiles
from grpo_kernels.grouped_gemm._fp8_kernels_triton import TABLE_ENTRY, fp8_grouped_kernel, tile_table_kernel


def tile_table(offsets: Tensor, rows: int, block_m: int) -> Tensor:
    """[1 + most tiles, 4] int32. The first entry begins with the number of tiles; every tile has one behind it: expert
    (-1: of none), first row, end row. What lies behind the last tile is not written."""
    experts = len(offsets)
    table = offsets.new_empty((1 + row_tiles(rows, experts, block_m), TABLE_ENTRY.value), dtype=torch.int32)
    offsets = offsets.contiguous()

    def launch() -> None:
        tile_table_kernel[(experts + 1,)](
            offsets, table, rows, experts, SEGMENTS=segments(experts), BLOCK_M=block_m, BLOCK=TABLE_BLOCK, num_warps=4
        )

    run(offsets, launch)
    return table


def strides(data: Tensor) -> tuple[int, ...]:
    """Of all axes but the last; an axis of one element lies anywhere, and may as well lie close."""
    found: list[int] = []
    extent = aligned(data.shape[-1], 16)
    for size, stride in zip(data.shape[-2::-1], data.stride()[-2::-1], strict=True):
        found.append(stride if size > 1 else extent)
        extent = size * found[-1]
    return tuple(found[::-1])


def loadable(data: Tensor) -> Tensor:
    """Rows of K, K dense, at multiples of 16 bytes, as fp8_quantize writes them. Anything else is copied."""
    width = data.shape[-1]
    outer = strides(data)
    apart = all(stride % 16 == 0 and stride > 0 for stride in outer) and width <= outer[-1] < 2**31 // TILE
    if apart and (width == 1 or data.stride(-1) == 1) and pointer(data) % 16 == 0:
        return data
    return empty_data(data, tuple(data.shape[:-2]), *data.shape[-2:]).copy_(data)


def fp8_grouped_gemm(
    data: Tensor,
    scale: Tensor,
    weight_data: Tensor,
    weight_scale: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    target = architecture(data)
    if target < HARDWARE:
        x = fp8_ops.fp8_dequantize(data, scale, torch.bfloat16, "triton")
        weight = fp8_ops.fp8_dequantize(weight_data, weight_scale, torch.bfloat16, "triton")
        widened: Tensor = ops.grouped_gemm(x, weight, offsets, bias, out_dtype, "triton")
        return widened
    out = ops.empty_output(data, weight_data, out_dtype)
    experts, columns, width = weight_data.shape
    rows = len(data)
    if rows == 0:
        return out
    data, weight_data = loadable(data), loadable(weight_data)
    loads = "tma" if target >= 90 else "vector" if width % 16 == 0 else "scalar"
    config = launch_config(rows, experts, width, target)
    table = tile_table(offsets, rows, config.block_m)
    grid = programs(data, (len(table) - 1) * triton.cdiv(columns, TILE), config.on_each)

    def launch() -> None:
        fp8_grouped_kernel[(grid,)](
            data,
            scale,
            weight_data,
            weight_scale,
            table,
            None if bias is None else bias.contiguous(),
            out,
            rows,
            columns,
            width,
            experts,
            *strides(data),
            *scale.stride(),
            *strides(weight_data),
            *weight_scale.stride(),
            config.group,
            LOADS=loads,
            HAS_BIAS=bias is not None,
            PRECISION=precision(data.dtype),
            SPECIALIZED=config.specialized,
            BLOCK_M=config.block_m,
            TILE=TILE,
            PIECES=1 if config.specialized else TILE // PANEL,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )

    run(data, launch)
    return out
