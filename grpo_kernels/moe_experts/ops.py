"""Schemas of the activation's kernels. Imports torch alone, so that they exist before anything is traced."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels import _dispatch

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
