"""The activation through the C++ CPU kernels: allocates the outputs and calls the launcher."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels import _extension
from grpo_kernels._extension import DTYPE_CODE, fp8_tensor, pointer
from grpo_kernels.moe_experts.ops import (
    QuantizedNeeds,
    empty_activated,
    empty_gradients,
    empty_quantized_glu,
    empty_quantized_gradients,
)
from grpo_kernels.moe_permute.maps import check_slots

_Activation = tuple[bool, float, float, bool]


def _rows(
    shape: torch.Size, dtype: torch.dtype, inv_map: Tensor, topk_weights: Tensor | None, activation: _Activation
) -> tuple[int | float | bool, ...]:
    """csrc/moe_experts/moe_experts.h: GluRows but for the pre-activations, of dense tensors."""
    return (
        shape[0],
        shape[1] // 2,
        DTYPE_CODE[dtype],
        inv_map.data_ptr(),
        0 if topk_weights is None else topk_weights.numel(),
        pointer(topk_weights),
        *activation,
    )


def _layout(
    preact: Tensor, inv_map: Tensor, topk_weights: Tensor | None, activation: _Activation
) -> tuple[int | float | bool, ...]:
    """GluRows."""
    return (*_rows(preact.shape, preact.dtype, inv_map, topk_weights, activation), preact.data_ptr())


def moe_glu(
    preact: Tensor,
    inv_map: Tensor,
    topk_weights: Tensor | None,
    clamped: bool,
    alpha: float,
    limit: float,
    interleaved: bool,
) -> Tensor:
    activated = empty_activated(preact)
    preact, inv_map = preact.contiguous(), inv_map.contiguous()
    topk_weights = None if topk_weights is None else topk_weights.contiguous()
    bad_row = _extension.extension().moe_glu(
        *_layout(preact, inv_map, topk_weights, (clamped, alpha, limit, interleaved)),
        activated.data_ptr(),
        *_extension.execution(preact),
    )
    if bad_row >= 0 and topk_weights is not None:
        check_slots("moe_glu", inv_map, topk_weights.numel(), "inv_map")
    return activated


def moe_glu_backward(
    preact: Tensor,
    grad_activated: Tensor,
    inv_map: Tensor,
    topk_weights: Tensor,
    row_terms: Tensor | None,
    clamped: bool,
    alpha: float,
    limit: float,
    interleaved: bool,
    need_preact: bool,
    need_activated: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    needs = (need_preact, need_activated, need_weights)
    outputs = empty_gradients(preact, topk_weights, *needs)
    preact, inv_map, topk_weights = preact.contiguous(), inv_map.contiguous(), topk_weights.contiguous()
    grad_activated = grad_activated.contiguous()
    row_terms = None if row_terms is None else row_terms.contiguous()
    bad_row = _extension.extension().moe_glu_backward(
        *_layout(preact, inv_map, topk_weights, (clamped, alpha, limit, interleaved)),
        grad_activated.data_ptr(),
        pointer(row_terms),
        *(output.data_ptr() if need else 0 for output, need in zip(outputs, needs, strict=True)),
        *_extension.execution(preact),
    )
    if bad_row >= 0:
        check_slots("moe_glu_backward", inv_map, topk_weights.numel(), "inv_map")
    return outputs


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
    outputs = empty_quantized_glu(preact, keep_preact)
    preact, inv_map = preact.contiguous(), inv_map.contiguous()
    _extension.extension().moe_glu_quantize(
        *_layout(preact, inv_map, None, (clamped, alpha, limit, interleaved)),
        eps,
        fp8_tensor(*outputs[:2]),
        fp8_tensor(*outputs[2:]),
        *_extension.execution(preact),
    )
    return outputs


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
) -> tuple[Tensor, ...]:
    if dtype == torch.float64:
        raise TypeError("moe_glu_backward_quantize: dtype must be float32, bfloat16 or float16, got float64")
    needs = QuantizedNeeds(rows, columns, wide, activated_columns, activated_wide, need_weights)
    outputs = empty_quantized_gradients(preact_data, topk_weights, needs, dtype)
    inv_map, topk_weights = inv_map.contiguous(), topk_weights.contiguous()
    preact_data = preact_data if preact_data.stride(-1) == 1 else preact_data.contiguous()
    grad_activated = None if grad_activated is None else grad_activated.contiguous()
    row_terms = None if row_terms is None else row_terms.contiguous()
    module, (device, threads) = _extension.extension(), _extension.execution(preact_data)
    floats = module.moe_glu_quantize_workspace(preact_data.shape[1] // 2, columns or activated_columns, threads)
    workspace = preact_data.new_empty(floats, dtype=torch.float32)
    bad_row = module.moe_glu_backward_quantize(
        *_rows(preact_data.shape, dtype, inv_map, topk_weights, (clamped, alpha, limit, interleaved)),
        0,
        fp8_tensor(preact_data, preact_scale),
        pointer(grad_activated),
        DTYPE_CODE[dtype if grad_activated is None else grad_activated.dtype],
        pointer(row_terms),
        eps,
        grad_eps,
        fp8_tensor(outputs.data, outputs.scale),
        fp8_tensor(outputs.data_t, outputs.scale_t),
        outputs.wide.data_ptr() if wide else 0,
        fp8_tensor(outputs.activated_data_t, outputs.activated_scale_t),
        outputs.activated_wide.data_ptr() if activated_wide else 0,
        outputs.weights.data_ptr() if need_weights else 0,
        workspace.data_ptr(),
        device,
        threads,
    )
    if bad_row >= 0:
        check_slots("moe_glu_backward_quantize", inv_map, topk_weights.numel(), "inv_map")
    return tuple(outputs)
