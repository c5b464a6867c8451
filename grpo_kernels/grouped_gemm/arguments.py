"""Checks that more than the public function needs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from grpo_kernels.distributed.vocab import is_dtensor

_REMEDY = "call the op in the forward of the module that owns it, as grpo_kernels.MoE does"


def check_present(op: str, name: str, tensor: Tensor) -> None:
    """The tensor is whole and in memory, not what a sharding library leaves of it between forwards.

    Raises:
        TypeError: it is a DTensor.
        ValueError: its memory is freed.
    """
    if is_dtensor(tensor):
        placements = ", ".join(map(str, tensor.placements))  # type: ignore[attr-defined]
        raise TypeError(f"{op}: {name} must not be a DTensor, got one with placements ({placements}): {_REMEDY}")
    if torch.compiler.is_compiling() or type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type == "meta":
        return
    if tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0:
        raise ValueError(f"{op}: the memory of {name} {list(tensor.shape)} is freed, as FSDP does: {_REMEDY}")


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
