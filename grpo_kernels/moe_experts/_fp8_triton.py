"""The experts' activation that quantises, through Triton: the launchers."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from grpo_kernels._fp8_triton import TILE, encoding
from grpo_kernels._launch import on_device
from grpo_kernels.fp8_quantize.layout import empty_scale
from grpo_kernels.moe_experts._fp8_backward_kernels_triton import (
    COLUMN_WARPS,
    COLUMNS,
    glu_backward_columns_kernel,
    glu_backward_rows_kernel,
)
from grpo_kernels.moe_experts._fp8_kernels_triton import glu_quantize_kernel
from grpo_kernels.moe_experts._kernels_triton import WARPS, rows_of_program
from grpo_kernels.moe_experts.ops import (
    QuantizedGradients,
    QuantizedNeeds,
    empty_quantized_glu,
    empty_quantized_gradients,
)

_FORWARD_ROWS = 8
"""Of a program: eight elements a thread, and their eight bytes of codes. Twice as many where pairs make the activation."""


class _Tiles(NamedTuple):
    """FP8 as kernels take it: bytes, the stride of their rows, scales whose rows are adjacent, the stride of their tiles.
    Nothing of what is not wanted."""

    codes: Tensor | None = None
    stride: int = 0
    scale: Tensor | None = None
    scale_stride: int = 0


def _tiles(data: Tensor, scale: Tensor) -> _Tiles:
    """Of outputs."""
    if data.ndim < 2:
        return _Tiles()
    return _Tiles(data.view(torch.uint8), data.stride(0), scale, scale.stride(1))


def _operand(data: Tensor, scale: Tensor) -> _Tiles:
    """Of an operand, copied where it lies otherwise."""
    rows, width = data.shape
    if data.stride(1) != 1:
        data = data.contiguous()
    if scale.stride(0) != 1:
        scale = empty_scale(data, (), rows, width, False).copy_(scale)
    return _tiles(data, scale)


def moe_glu_quantize(
    preact: Tensor,
    inv_map: Tensor,
    clamped: bool,
    alpha: float,
    limit: float,
    interleaved: bool,
    keep_preact: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    data, scale, preact_data, preact_scale = out = empty_quantized_glu(preact, keep_preact)
    rows, width = data.shape
    if data.numel() == 0:
        return out
    whole = interleaved or width % TILE == 0
    tiles = triton.cdiv(width, TILE) + (0 if whole or not keep_preact else triton.cdiv(2 * width, TILE))
    of_program = _FORWARD_ROWS * (2 if interleaved else 1)
    activated, kept = _tiles(data, scale), _tiles(preact_data, preact_scale)
    with on_device(preact):
        glu_quantize_kernel[(triton.cdiv(rows, of_program) * tiles,)](
            preact.contiguous(),
            inv_map.contiguous(),
            activated.codes,
            activated.scale,
            kept.codes,
            kept.scale,
            alpha,
            limit,
            eps,
            rows,
            width,
            activated.stride,
            activated.scale_stride,
            kept.stride,
            kept.scale_stride,
            CLAMPED=clamped,
            INTERLEAVED=interleaved,
            KEEP=keep_preact,
            WHOLE=whole,
            ENCODE=encoding(preact),
            ROWS=of_program,
            num_warps=WARPS,
        )
    return out


def moe_glu_backward_quantize(
    preact_data: Tensor,
    preact_scale: Tensor,
    grad_activated: Tensor | None,
    inv_map: Tensor,
    topk_weights: Tensor,
    row_terms: Tensor | None,
    clamped: bool,
    alpha: float,
    limit: float,
    interleaved: bool,
    rows: bool,
    columns: bool,
    wide: bool,
    activated_columns: bool,
    activated_wide: bool,
    need_weights: bool,
    eps: float,
    grad_eps: float,
    dtype: torch.dtype,
) -> QuantizedGradients:
    needs = QuantizedNeeds(rows, columns, wide, activated_columns, activated_wide, need_weights)
    out = empty_quantized_gradients(preact_data, topk_weights, needs, dtype)
    if preact_data.numel() == 0:
        return out
    operands = (
        _operand(preact_data, preact_scale),
        None if grad_activated is None else grad_activated.contiguous(),
        inv_map.contiguous(),
        topk_weights.contiguous(),
        preact_data.shape[1] // 2,
    )
    flags = {"CLAMPED": clamped, "INTERLEAVED": interleaved, "ENCODE": encoding(preact_data)}
    with on_device(preact_data):
        if rows or wide or activated_wide or need_weights:
            terms = None if row_terms is None else row_terms.contiguous()
            _write_rows(out, needs, *operands, terms, (alpha, limit, grad_eps), flags)
        if columns or activated_columns:
            _write_columns(out, needs, *operands, (alpha, limit, eps, grad_eps), flags)
    return out


def _write_rows(
    out: QuantizedGradients,
    needs: QuantizedNeeds,
    preact: _Tiles,
    grad_activated: Tensor | None,
    inv_map: Tensor,
    weights: Tensor,
    width: int,
    row_terms: Tensor | None,
    numbers: tuple[float, ...],
    flags: dict[str, object],
) -> None:
    rows = len(inv_map)
    of_program = rows_of_program(out.wide.element_size(), False)
    tiles = _tiles(out.data, out.scale)
    glu_backward_rows_kernel[(triton.cdiv(rows, of_program),)](
        preact.codes,
        preact.scale,
        grad_activated,
        inv_map,
        weights,
        row_terms,
        tiles.codes,
        tiles.scale,
        out.wide,
        out.activated_wide,
        out.weights,
        *numbers,
        rows,
        weights.numel(),
        width,
        preact.stride,
        preact.scale_stride,
        tiles.stride,
        tiles.scale_stride,
        WHOLE=bool(flags["INTERLEAVED"]) or width % TILE == 0,
        HAS_TERMS=row_terms is not None,
        TILES=needs.rows,
        WIDE=needs.wide,
        ACTIVATED=needs.activated_wide,
        WEIGHTS=needs.weights,
        ROWS=of_program,
        num_warps=WARPS,
        **flags,
    )


def _write_columns(
    out: QuantizedGradients,
    needs: QuantizedNeeds,
    preact: _Tiles,
    grad_activated: Tensor | None,
    inv_map: Tensor,
    weights: Tensor,
    width: int,
    numbers: tuple[float, ...],
    flags: dict[str, object],
) -> None:
    rows = len(inv_map)
    grad = _tiles(out.data_t, out.scale_t)
    activated = _tiles(out.activated_data_t, out.activated_scale_t)
    glu_backward_columns_kernel[(triton.cdiv(rows, TILE) * triton.cdiv(width, COLUMNS),)](
        preact.codes,
        preact.scale,
        grad_activated,
        inv_map,
        weights,
        grad.codes,
        grad.scale,
        activated.codes,
        activated.scale,
        *numbers,
        rows,
        weights.numel(),
        width,
        preact.stride,
        preact.scale_stride,
        grad.stride,
        grad.scale_stride,
        activated.stride,
        activated.scale_stride,
        WHOLE=bool(flags["INTERLEAVED"]) or width % COLUMNS == 0,
        GRADIENT=needs.columns,
        ACTIVATED=needs.activated_columns,
        COLUMNS=COLUMNS,
        num_warps=COLUMN_WARPS,
        **flags,
    )
