"""The move that quantises, through Triton: the launchers."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from grpo_kernels._fp8_triton import TILE, encoding
from grpo_kernels._launch import on_device
from grpo_kernels.moe_permute._kernels_triton import PADDING_ROWS
from grpo_kernels.moe_permute._quantize_kernels_triton import (
    gather_quantize_kernel,
    permute_quantize_kernel,
    quantize_config,
)
from grpo_kernels.moe_permute.layout import dense_rows
from grpo_kernels.moe_permute.ops import empty_quantized_rows


def moe_permute_quantize(
    x: Tensor, row_id_map: Tensor, inv_map: Tensor, power_of_two: bool, columns: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = empty_quantized_rows(x, row_id_map, inv_map, power_of_two, columns, eps)
    if out[0].numel() == 0:
        return out
    x, row_id_map, inv_map = dense_rows(x), row_id_map.contiguous(), inv_map.contiguous()
    launch = _gather if columns else _scatter
    with on_device(x):
        launch(x, row_id_map, inv_map, power_of_two, eps, *out)
    return out


def _scatter(
    x: Tensor,
    row_id_map: Tensor,
    inv_map: Tensor,
    power_of_two: bool,
    eps: float,
    data: Tensor,
    scale: Tensor,
    *_: Tensor,
) -> None:
    (tokens, top_k), (rows, hidden) = row_id_map.shape, data.shape
    config = quantize_config(hidden, top_k)
    grid = (tokens + triton.cdiv(rows, PADDING_ROWS), triton.cdiv(hidden, TILE * config.tiles))
    permute_quantize_kernel[grid](
        x,
        row_id_map,
        inv_map,
        data.view(torch.uint8),
        scale,
        tokens,
        rows,
        top_k,
        hidden,
        x.stride(0),
        data.stride(0),
        scale.stride(1),
        eps,
        POWER_OF_TWO=power_of_two,
        ENCODE=encoding(x),
        SLOTS=config.slots,
        PADDING=PADDING_ROWS,
        TILES=config.tiles,
        num_warps=config.num_warps,
    )


def _gather(
    x: Tensor,
    row_id_map: Tensor,
    inv_map: Tensor,
    power_of_two: bool,
    eps: float,
    data: Tensor,
    scale: Tensor,
    data_t: Tensor,
    scale_t: Tensor,
) -> None:
    rows, hidden = data.shape
    gather_quantize_kernel[(triton.cdiv(rows, TILE) * triton.cdiv(hidden, TILE),)](
        x,
        inv_map,
        data.view(torch.uint8),
        scale,
        data_t.view(torch.uint8),
        scale_t,
        rows,
        row_id_map.numel(),
        max(row_id_map.shape[1], 1),
        hidden,
        x.stride(0),
        data.stride(0),
        scale.stride(1),
        data_t.stride(0),
        scale_t.stride(1),
        eps,
        POWER_OF_TWO=power_of_two,
        ENCODE=encoding(x),
        num_warps=8,
    )
