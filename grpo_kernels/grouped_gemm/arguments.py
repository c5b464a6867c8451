"""Checks that more than the public function needs."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels import _checks, _sharded

_MAX_ROWS = 2**31 - 2**14
"""Kernels count rows in 32 bits, those that the next turn of a program would take included."""
_REMEDY = "call the op in the forward of the module that owns it, as grpo_kernels.MoE does"


def check_present(op: str, name: str, tensor: Tensor, shape: str = "") -> None:
    """The tensor is whole and in memory, not what a sharding library leaves of it between forwards.

    Args:
        shape: of a parameter, such as "[E, N, K]".

    Raises:
        TypeError: it is a DTensor.
        ValueError: it is not gathered, or its memory is freed.
    """
    _sharded.check_present(op, name, tensor, _REMEDY, shape=shape)


def check_rows(op: str, name: str, x: Tensor) -> None:
    """There are not too many."""
    if x.shape[0] > _MAX_ROWS:
        raise ValueError(f"{op}: {name} must have at most R = 2^31 - 2^14 rows, got {x.shape[0]}")


def check_offsets(op: str, offsets: Tensor, experts: int, name: str, x: Tensor) -> None:
    """One integer for each expert, on the device of the rows `x`."""
    _checks.check_tensor(op, "offsets", offsets)
    _checks.check_dtype(op, "offsets", offsets, _checks.INTEGER)
    _checks.check_shape(op, "offsets", offsets, ("[E]", (experts,)))
    _checks.check_same_device(op, "offsets", offsets, name, x)


def check_bias(op: str, bias: Tensor, experts: int, columns: int, name: str, x: Tensor) -> None:
    """[E, N] of any floating dtype, on the device of the rows `x`."""
    _checks.check_tensor(op, "bias", bias)
    _checks.check_dtype(op, "bias", bias)
    _checks.check_shape(op, "bias", bias, ("[E, N]", (experts, columns)))
    _checks.check_same_device(op, "bias", bias, name, x)


def check_accumulator(op: str, name: str, accumulator: Tensor, owner: str, weight: Tensor, shape: str) -> None:
    """What the gradient of `weight`, the argument `owner` of the symbolic `shape`, is added to."""
    _checks.check_tensor(op, name, accumulator)
    wanted = torch.float64 if weight.dtype == torch.float64 else torch.float32
    _checks.check_dtype(op, name, accumulator, (wanted,))
    _checks.check_shape(op, name, accumulator, (shape, tuple(weight.shape)))
    _checks.check_same_device(op, name, accumulator, owner, weight)
    if 1 not in accumulator.stride()[1:] or accumulator.requires_grad:
        raise ValueError(f"{op}: {name} must have one of the last two axes dense and not require a gradient itself")
    if torch.is_grad_enabled() and not weight.requires_grad:
        raise ValueError(f"{op}: {name} is for the gradient of {owner}, which does not require one")


def segment_ends(op: str, offsets: Tensor, rows: int) -> list[int]:
    """The end row of every expert's segment, read on the CPU.

    Raises:
        ValueError: one is below the one before it, or beyond the last row.
    """
    ends: list[int] = offsets.tolist()
    before = 0
    for expert, end in enumerate(ends):
        if not before <= end <= rows:
            wanted = f">= {before}, where the segment begins, and <= R = {rows}"
            raise ValueError(f"{op}: offsets[{expert}] must be {wanted}, got {end}")
        before = end
    return ends
