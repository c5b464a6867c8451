"""The activation through the C++ CPU kernels: allocates the outputs and calls the launcher."""

from __future__ import annotations

from torch import Tensor

from grpo_kernels import _extension
from grpo_kernels._extension import DTYPE_CODE, pointer
from grpo_kernels.moe_experts.ops import empty_activated, empty_gradients
from grpo_kernels.moe_permute.maps import check_slots


def _layout(
    preact: Tensor, inv_map: Tensor, topk_weights: Tensor | None, activation: tuple[bool, float, float, bool]
) -> tuple[int | float | bool, ...]:
    """The arguments that forward and backward share, of dense tensors."""
    return (
        preact.shape[0],
        preact.shape[1] // 2,
        DTYPE_CODE[preact.dtype],
        inv_map.data_ptr(),
        0 if topk_weights is None else topk_weights.numel(),
        pointer(topk_weights),
        *activation,
        preact.data_ptr(),
    )


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
