"""The public functions: argument checks and the choice of a backend."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_kernels import _checks, _direct, _dispatch
from grpo_kernels.moe_permute import ops, reference
from grpo_kernels.moe_permute.function import Permute, Unpermute
from grpo_kernels.moe_permute.layout import check_sizes, raise_outside

_INT32 = (torch.int32,)
_known: dict[tuple[str, bytes], None] = {}
"""Calls of the moves that have passed the checks."""


class Permutation(NamedTuple):
    """Where the copies of tokens lie among the rows of their experts. All int32, on the device of the ids.

    Attributes:
        row_id_map: [T, K]. The row of a token's slot; -1 where the slot has none.
        inv_map: [R]. token * K + slot of a row; -1 where the row is padding.
        offsets: [E]. The row behind each expert's segment, padding included: what `F.grouped_mm` takes as `offs`. E
            counts the experts of `expert_range`.
        tokens_per_expert: [E]. Rows of each expert that are not padding.
    """

    row_id_map: Tensor
    inv_map: Tensor
    offsets: Tensor
    tokens_per_expert: Tensor


def build_permutation(
    topk_ids: Tensor, num_experts: int, *, alignment: int = 1, expert_range: tuple[int, int] | None = None
) -> Permutation:
    """The map that brings the copies of tokens together, expert by expert.

    A stable counting sort: the rows of an expert are neighbours, in the order of token * K + slot, and its segment is
    filled up with padding rows to a multiple of `alignment`::

        R = T * K + min(E, T * K) * (alignment - 1), down to a multiple of alignment

    rows always suffice, so that no shape depends on the routes. What is behind the last segment is padding too.

    Args:
        topk_ids: [T, K] int32 or int64. The experts of each token. Negative = this slot has no expert. An expert may
            stand in several slots of a token.
        num_experts: ids lie below it; at most 1024.
        alignment: >= 1. Rows; every expert's segment is a multiple of it.
        expert_range: (start, end). Only these experts get rows, and `offsets` and `tokens_per_expert` count from
            `start`: the experts of one rank. None = all.

    Returns:
        `Permutation(row_id_map, inv_map, offsets, tokens_per_expert)`. No gradient.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or range, or there are 2^31 slots or rows
            and more; on the CPU also where an id is >= num_experts. On other devices such a slot has no row.

    Numerics:
        Integers; the same in every run, on every device and with any number of threads. T = 0 gives no rows. No host
        synchronisation.

    Source:
        Megatron-LM's and TransformerEngine's permutation with `routing_map`, without the [T, E] map; the segments are
        those of `torch.nn.functional.grouped_mm`.
    """
    op = "build_permutation"
    first, last = _check_experts(op, topk_ids, num_experts, alignment, expert_range)
    arguments = (topk_ids, num_experts, first, last, alignment)
    backend = _dispatch.resolve(op, topk_ids)
    if backend == "reference":
        if topk_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            outside = (topk_ids >= num_experts).reshape(-1)
            if outside.any():
                raise_outside(topk_ids, int(outside.to(torch.uint8).argmax()), num_experts)
        return Permutation(*reference.build_permutation(*arguments))
    return Permutation(*ops.build_permutation(*arguments, backend))


def moe_permute(x: Tensor, permutation: Permutation) -> Tensor:
    """The rows of the experts: row r is a copy of token inv_map[r] // K, or 0 where r is padding.

    Args:
        x: [T, H] bf16, fp16, fp32 or fp64. A view with a dense last axis is not copied.
        permutation: of these T tokens, from `build_permutation`.

    Returns:
        [R, H] in the dtype of x: its bits. The gradient of a token is the sum of the gradients of its rows; those of
        padding rows are not read.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device; on the CPU also where the maps do
            not belong together. On other devices an entry beyond R or T * K counts as -1.

    Numerics:
        The gradient is accumulated in fp32 (fp64 for fp64) in the order of the slots and rounded once; a token's bits
        do not depend on the other tokens. Deterministic. Saves row_id_map alone: 4 bytes for each slot.

    Source:
        `moe_permute` of TransformerEngine, `permute` of Megatron-LM.
    """
    op = "moe_permute"
    call = _call(op, permutation, x)
    if call is None or call not in _known:
        check_rows(op, "x", x, permutation, "[T, H]", "row_id_map")
        if call is not None:
            _direct.remember(_known, call, None)
    backend = _dispatch.resolve(op, x)
    row_id_map, inv_map = permutation.row_id_map, permutation.inv_map
    if backend == "reference":
        return reference.moe_permute(x, row_id_map, inv_map)
    if torch.is_grad_enabled() and x.requires_grad:
        applied: Tensor = Permute.apply(x, row_id_map, inv_map, backend, call is not None)  # type: ignore[no-untyped-call]
        return applied
    kernel = ops.moe_permute if call is None else ops.moe_permute_unwatched
    rows: Tensor = kernel(x, row_id_map, inv_map, None, backend)
    return rows


def moe_unpermute(y: Tensor, permutation: Permutation, topk_weights: Tensor | None = None) -> Tensor:
    """The sum of every token's rows: out[t] = sum_k topk_weights[t, k] * y[row_id_map[t, k]].

    Args:
        y: [R, H] bf16, fp16, fp32 or fp64. Padding rows are never read: they may hold anything, NaN included. A view
            with a dense last axis is not copied.
        permutation: from `build_permutation`.
        topk_weights: [T, K] float. The weight of each slot; None = 1. That of a slot without a row is not looked at.

    Returns:
        [T, H] in the dtype of y; 0 for a token without rows. Differentiable in y (weight times upstream gradient, 0 in
        padding rows) and in topk_weights (the product of upstream gradient and row, 0 for slots without a row).

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device; on the CPU also where row_id_map
            names a row that is not there, and in the backward where the maps do not belong together. On other devices
            such an entry counts as -1.

    Numerics:
        Accumulated in fp32 (fp64 for fp64 rows) in the order of the slots 0 to K - 1, and rounded once; the gradient of
        the weights is an fp32 sum in a fixed order. A token's bits do not depend on the other tokens. Deterministic.
        Saves the two maps and the weights; y only where the weights need a gradient.

    Source:
        `moe_unpermute` of TransformerEngine, `unpermute` of Megatron-LM.
    """
    op = "moe_unpermute"
    call = _call(op, permutation, y, topk_weights)
    if call is None or call not in _known:
        check_rows(op, "y", y, permutation, "[R, H]", "inv_map")
        if topk_weights is not None:
            _checks.check_tensor(op, "topk_weights", topk_weights)
            _checks.check_dtype(op, "topk_weights", topk_weights)
            _checks.check_shape(op, "topk_weights", topk_weights, ("[T, K]", permutation.row_id_map.shape))
            _checks.check_same_device(op, "topk_weights", topk_weights, "y", y)
        if call is not None:
            _direct.remember(_known, call, None)
    row_id_map, inv_map = permutation.row_id_map, permutation.inv_map
    if topk_weights is not None:
        topk_weights = topk_weights.to(ops.accumulation_dtype(y))
    backend = _dispatch.resolve(op, y)
    if backend == "reference":
        return reference.moe_unpermute(y, row_id_map, topk_weights)
    differentiable = y.requires_grad or (topk_weights is not None and topk_weights.requires_grad)
    if torch.is_grad_enabled() and differentiable:
        arguments = (y, row_id_map, inv_map, topk_weights, backend, call is not None)
        applied: Tensor = Unpermute.apply(*arguments)  # type: ignore[no-untyped-call]
        return applied
    kernel = ops.moe_unpermute if call is None else ops.moe_unpermute_unwatched
    tokens: Tensor = kernel(y, row_id_map, topk_weights, backend)
    return tokens


def _call(op: str, permutation: Permutation, *tensors: Tensor | None) -> tuple[str, bytes] | None:
    """A call by all that its checks look at; None where somebody watches, or where a tensor is not plain."""
    if type(permutation) is not Permutation:
        return None
    alike = _direct.signature((*tensors, permutation.row_id_map, permutation.inv_map))
    return None if alike is None else (op, alike)


def _check_experts(op: str, topk_ids: Tensor, num_experts: int, alignment: int, expert_range: Any) -> tuple[int, int]:
    """Raises on a bad argument; returns the range of experts."""
    _checks.check_tensor(op, "topk_ids", topk_ids)
    _checks.check_dtype(op, "topk_ids", topk_ids, _checks.INTEGER)
    _checks.check_ndim(op, "topk_ids", topk_ids, "[T, K]")
    _checks.check_integer(op, "num_experts", num_experts, minimum=1)
    _checks.check_integer(op, "alignment", alignment, minimum=1)
    first, last = 0, num_experts
    if expert_range is not None:
        if not isinstance(expert_range, (tuple, list)) or len(expert_range) != 2:
            raise TypeError(f"{op}: expert_range must be a pair (start, end), got {expert_range!r}")
        first, last = expert_range
        _checks.check_integer(op, "expert_range[0]", first, minimum=0)
        _checks.check_integer(op, "expert_range[1]", last, minimum=first)
        if last > num_experts:
            raise ValueError(f"{op}: expert_range must end at num_experts = {num_experts} at most, got {expert_range}")
    check_sizes(op, topk_ids.shape[0] * topk_ids.shape[1], last - first, num_experts, alignment)
    return first, last


def check_rows(op: str, name: str, values: Tensor, permutation: Permutation, shape: str, map_name: str) -> None:
    """`values` has a row for each of the map that is named."""
    _checks.check_tensor(op, name, values)
    _checks.check_dtype(op, name, values)
    _checks.check_ndim(op, name, values, shape)
    if not isinstance(permutation, Permutation):
        raise TypeError(f"{op}: permutation must be a Permutation, got {type(permutation).__name__}")
    for field in ("row_id_map", "inv_map"):
        value = getattr(permutation, field)
        _checks.check_tensor(op, f"permutation.{field}", value)
        _checks.check_dtype(op, f"permutation.{field}", value, _INT32)
        _checks.check_same_device(op, f"permutation.{field}", value, name, values)
    _checks.check_ndim(op, "permutation.row_id_map", permutation.row_id_map, "[T, K]")
    _checks.check_ndim(op, "permutation.inv_map", permutation.inv_map, "[R]")
    rows = getattr(permutation, map_name).shape[0]
    _checks.check_shape(op, name, values, (shape, [rows, values.shape[1]]))
