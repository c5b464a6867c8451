"""The move that quantises, on the CPU, made of registered ops: a token is quantised once, and its bytes are copied."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels.fp8_quantize import ops as fp8
from grpo_kernels.fp8_quantize.layout import aligned, empty_scale
from grpo_kernels.fp8_quantize.reference import tile_scale
from grpo_kernels.moe_permute import ops


def moe_permute_quantize(
    x: Tensor, row_id_map: Tensor, inv_map: Tensor, power_of_two: bool, columns: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if x.shape[1] == 0:
        return ops.empty_quantized_rows(x, row_id_map, inv_map, power_of_two, columns, eps)
    if columns:
        rows = ops.moe_permute(x, row_id_map, inv_map, None, "native")
        both: tuple[Tensor, Tensor, Tensor, Tensor] = fp8.fp8_quantize(
            rows, False, power_of_two, True, True, eps, "native"
        )
        return both
    data, scale, *absent = fp8.fp8_quantize(x, False, power_of_two, True, False, eps, "native")
    width = x.shape[1]
    if width % 16:  # what lies between rows belongs to nobody: these are rows of whole words
        padded = data.new_empty((x.shape[0], aligned(width, 16)))
        padded[:, :width] = data
        data = padded
    words = ops.moe_permute(data.view(torch.float64), row_id_map, inv_map, None, "native")
    rows = words.view(data.dtype)[:, :width]
    return (rows, _scales(x, scale, row_id_map, inv_map, power_of_two, eps), *absent)


def _scales(x: Tensor, scale: Tensor, row_id_map: Tensor, inv_map: Tensor, power_of_two: bool, eps: float) -> Tensor:
    """Those of the tokens, at their rows; of a tile of zeros in padding."""
    tokens, top_k = row_id_map.shape
    empty, _ = tile_scale(scale.new_zeros(()), power_of_two, eps)
    source = torch.where(inv_map >= 0, inv_map // max(top_k, 1), tokens)
    tiles = torch.cat([scale.mT, empty.expand(scale.shape[1], 1)], 1)
    found = empty_scale(x, (), inv_map.shape[0], x.shape[1], False)
    found.mT.copy_(tiles.index_select(1, source))
    return found
