"""Schemas of the permutation. Imports torch alone, so that they exist before anything is traced."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels import _dispatch
from grpo_kernels.fp8_quantize.layout import empty_data, empty_quantized, empty_scale
from grpo_kernels.moe_permute.reference import row_bound

_PACKAGE = "grpo_kernels.moe_permute"

_dispatch.register_backends("build_permutation", cpu=("native",), cuda=("native",))
for _name in ("moe_permute", "moe_permute_quantize", "moe_unpermute"):
    _dispatch.register_backends(_name, cpu=("native",), cuda=("triton",), interpretable=True)


def accumulation_dtype(values: Tensor) -> torch.dtype:
    """The dtype of weights, of sums and of the weights' gradients."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def empty_maps(
    topk_ids: Tensor, num_experts: int, first: int, last: int, alignment: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The outputs of build_permutation, not yet written."""
    experts = last - first
    return (
        topk_ids.new_empty(*topk_ids.shape, dtype=torch.int32),
        topk_ids.new_empty(row_bound(topk_ids.shape[0] * topk_ids.shape[1], experts, alignment), dtype=torch.int32),
        topk_ids.new_empty(experts, dtype=torch.int32),
        topk_ids.new_empty(experts, dtype=torch.int32),
    )


def empty_rows(x: Tensor, row_id_map: Tensor, inv_map: Tensor, topk_weights: Tensor | None) -> Tensor:
    """The output of moe_permute, not yet written."""
    return x.new_empty(inv_map.shape[0], x.shape[1])


def empty_tokens(y: Tensor, row_id_map: Tensor, topk_weights: Tensor | None) -> Tensor:
    """The output of moe_unpermute, not yet written."""
    return y.new_empty(row_id_map.shape[0], y.shape[1])


def empty_gradients(
    grad: Tensor, y: Tensor, row_id_map: Tensor, inv_map: Tensor, topk_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """The outputs of moe_unpermute_backward, not yet written."""
    return y.new_empty(y.shape), y.new_empty(row_id_map.shape, dtype=accumulation_dtype(y))


def empty_quantized_rows(
    x: Tensor, row_id_map: Tensor, inv_map: Tensor, power_of_two: bool, columns: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The outputs of moe_permute_quantize, not yet written."""
    rows, hidden = inv_map.shape[0], x.shape[1]
    plain = empty_data(x, (), rows, hidden), empty_scale(x, (), rows, hidden, False)
    if not columns:
        return (*plain, *empty_quantized(x, False, power_of_two, False, False, eps)[2:])
    return (*plain, empty_data(x, (), hidden, rows), empty_scale(x, (), hidden, rows, False))


_build_permutation = _dispatch.define(
    "build_permutation(Tensor topk_ids, int num_experts, int first, int last, int alignment, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    package=_PACKAGE,
    fake=empty_maps,
)
build_permutation = _dispatch.direct(_build_permutation)
"""row_id_map, inv_map, offsets, tokens_per_expert of the experts [first, last)."""

_moe_permute = _dispatch.define(
    "moe_permute(Tensor x, Tensor row_id_map, Tensor inv_map, Tensor? topk_weights, str backend) -> Tensor",
    package=_PACKAGE,
    definition="reference",
    fake=empty_rows,
)
moe_permute_unwatched = _dispatch.unwatched(_moe_permute)
moe_permute = _dispatch.direct(_moe_permute)
"""Rows of experts; each times its weight, where there are weights."""

_moe_unpermute = _dispatch.define(
    "moe_unpermute(Tensor y, Tensor row_id_map, Tensor? topk_weights, str backend) -> Tensor",
    package=_PACKAGE,
    definition="reference",
    fake=empty_tokens,
)
moe_unpermute_unwatched = _dispatch.unwatched(_moe_unpermute)
moe_unpermute = _dispatch.direct(_moe_unpermute)

moe_unpermute_backward = _dispatch.define(
    "moe_unpermute_backward(Tensor grad, Tensor y, Tensor row_id_map, Tensor inv_map, Tensor topk_weights, "
    "str backend) -> (Tensor, Tensor)",
    package=_PACKAGE,
    fake=empty_gradients,
)
"""The gradient of the rows, as moe_permute gives it with weights, and in the same pass that of the weights."""

moe_permute_quantize = _dispatch.define(
    "moe_permute_quantize(Tensor x, Tensor row_id_map, Tensor inv_map, bool power_of_two, bool columns, float eps, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    package=_PACKAGE,
    definition="quantize_reference",
    fake=empty_quantized_rows,
)
"""data, scale of the rows, as fp8_quantize gives them, and of their transpose where `columns`; [0] where not."""
