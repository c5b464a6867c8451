"""Schemas of the activation's kernels. Imports torch alone, so that they exist before anything is traced."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_kernels import _dispatch
from grpo_kernels.fp8_quantize.layout import DATA_DTYPE, empty_data, empty_scale

_PACKAGE = "grpo_kernels.moe_experts"

_dispatch.register_backends("moe_experts", cpu=("native",), cuda=("triton",), interpretable=True)

_ACTIVATION = "bool clamped, float alpha, float limit, bool interleaved"


def empty_activated(preact: Tensor) -> Tensor:
    """[R, I], not yet written."""
    return preact.new_empty((preact.shape[0], preact.shape[1] // 2))


def empty_gradients(
    preact: Tensor, topk_weights: Tensor, need_preact: bool, need_activated: bool, need_weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward's outputs; those that are not wanted are empty. Slots without a row keep the gradient 0."""
    nothing = preact.new_empty(0)
    return (
        torch.empty_like(preact, memory_format=torch.contiguous_format) if need_preact else nothing,
        empty_activated(preact) if need_activated else torch.empty_like(nothing),
        preact.new_zeros(topk_weights.shape if need_weights else (0,), dtype=topk_weights.dtype),
    )


def _forward_fake(preact: Tensor, *_: object) -> Tensor:
    return empty_activated(preact)


moe_glu = _dispatch.define(
    f"moe_glu(Tensor preact, Tensor inv_map, Tensor? topk_weights, {_ACTIVATION}, str backend) -> Tensor",
    package=_PACKAGE,
    fake=_forward_fake,
)
"""Activation [R, I] of pre-activations [R, 2I], times the row's weight if there are any; 0 in rows of padding.

inv_map [R] int32 names the slot, token * K + k, of a row, -1 for padding; topk_weights [T, K] are float32, or float64
for float64 pre-activations."""


def _backward_fake(
    preact: Tensor, grad_activated: Tensor, inv_map: Tensor, topk_weights: Tensor, *arguments: object
) -> tuple[Tensor, Tensor, Tensor]:
    need_preact, need_activated, need_weights = (bool(need) for need in arguments[-3:])
    return empty_gradients(preact, topk_weights, need_preact, need_activated, need_weights)


moe_glu_backward = _dispatch.define(
    "moe_glu_backward(Tensor preact, Tensor grad_activated, Tensor inv_map, Tensor topk_weights, Tensor? row_terms, "
    f"{_ACTIVATION}, bool need_preact, bool need_activated, bool need_weights, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    package=_PACKAGE,
    fake=_backward_fake,
)
"""What the backward needs of the activation A [R, I], given the gradient of A before its row's weight s:

the gradient of the pre-activations [R, 2I], s * A [R, I], and the gradient of the weights [T, K]: <grad_activated, A>
of the slot's row, plus its row_terms [R]. Rows of padding give 0 and are not read."""


def _empty_tiles(like: Tensor, wanted: bool, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """data, scale of [rows, width] in tiles of 1 x 128, not yet written; [0] where not wanted."""
    if not wanted:
        return like.new_empty(0, dtype=DATA_DTYPE), like.new_empty(0, dtype=torch.float32)
    return empty_data(like, (), rows, width), empty_scale(like, (), rows, width, False)


def empty_quantized_glu(preact: Tensor, keep_preact: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The outputs of moe_glu_quantize, not yet written."""
    rows, columns = preact.shape
    return (*_empty_tiles(preact, True, rows, columns // 2), *_empty_tiles(preact, keep_preact, rows, columns))


class QuantizedNeeds(NamedTuple):
    """Which outputs of moe_glu_backward_quantize are wanted."""

    rows: bool
    columns: bool
    wide: bool
    activated_columns: bool
    activated_wide: bool
    weights: bool

    @property
    def grad(self) -> bool:
        """Whether the gradient of the activation takes part."""
        return self.rows or self.columns or self.wide or self.weights


class QuantizedGradients(NamedTuple):
    """The outputs of moe_glu_backward_quantize; those that are not wanted are empty."""

    data: Tensor
    scale: Tensor
    data_t: Tensor
    scale_t: Tensor
    wide: Tensor
    activated_data_t: Tensor
    activated_scale_t: Tensor
    activated_wide: Tensor
    weights: Tensor


def empty_quantized_gradients(
    preact_data: Tensor, topk_weights: Tensor, needs: QuantizedNeeds, dtype: torch.dtype
) -> QuantizedGradients:
    """Not yet written; slots without a row keep the gradient 0."""
    rows, columns = preact_data.shape
    width = columns // 2

    def wide(wanted: bool, columns: int) -> Tensor:
        return preact_data.new_empty((rows, columns) if wanted else (0,), dtype=dtype)

    return QuantizedGradients(
        *_empty_tiles(preact_data, needs.rows, rows, columns),
        *_empty_tiles(preact_data, needs.columns, columns, rows),
        wide(needs.wide, columns),
        *_empty_tiles(preact_data, needs.activated_columns, width, rows),
        wide(needs.activated_wide, width),
        preact_data.new_zeros(topk_weights.shape if needs.weights else (0,), dtype=torch.float32),
    )


def _quantize_fake(preact: Tensor, *arguments: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty_quantized_glu(preact, bool(arguments[-2]))


moe_glu_quantize = _dispatch.define(
    f"moe_glu_quantize(Tensor preact, Tensor inv_map, {_ACTIVATION}, bool keep_preact, float eps, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    package=_PACKAGE,
    definition="glu_reference",
    fake=_quantize_fake,
)
"""data, scale of the activation [R, I] of pre-activations [R, 2I], quantised from float32 in tiles of 1 x 128 with
powers of two for scales, and of the pre-activations themselves where `keep_preact`, else [0]. Rows of padding are
zeros."""


def _backward_quantize_fake(
    preact_data: Tensor,
    preact_scale: Tensor,
    grad_activated: Tensor | None,
    inv_map: Tensor,
    topk_weights: Tensor,
    row_terms: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    needs = QuantizedNeeds(*map(bool, arguments[4:10]))
    return tuple(empty_quantized_gradients(preact_data, topk_weights, needs, arguments[-1]))


moe_glu_backward_quantize = _dispatch.define(
    "moe_glu_backward_quantize(Tensor preact_data, Tensor preact_scale, Tensor? grad_activated, Tensor inv_map, "
    f"Tensor topk_weights, Tensor? row_terms, {_ACTIVATION}, bool rows, bool columns, bool wide, "
    "bool activated_columns, bool activated_wide, bool need_weights, float eps, float grad_eps, ScalarType dtype, "
    "str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    package=_PACKAGE,
    definition="glu_reference",
    fake=_backward_quantize_fake,
)
"""What moe_glu_backward gives, of pre-activations that are kept in tiles of 1 x 128: `QuantizedGradients`.

The gradient of the pre-activations [R, 2I] in tiles of 1 x 128 (`rows`), its transpose [2I, R] likewise (`columns`),
and in `dtype` (`wide`); s * A transposed [I, R] and in `dtype`; and the gradient of the weights. What is quantised are
the float32 values: no scale below that of a tile of `grad_eps`, for s * A of `eps`. `dtype` is not float64. Without a
grad_activated nothing but s * A can be had."""
