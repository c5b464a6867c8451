"""The definition of the move that quantises: the move, then the quantisation, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from grpo_kernels.fp8_quantize import reference as fp8
from grpo_kernels.moe_permute import reference


def moe_permute_quantize(
    x: Tensor, row_id_map: Tensor, inv_map: Tensor, power_of_two: bool, columns: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """data, scale of the rows, and of their transpose where `columns`; [0] where not."""
    rows = reference.moe_permute(x, row_id_map, inv_map)
    return fp8.fp8_quantize(rows, False, power_of_two, True, columns, eps)
