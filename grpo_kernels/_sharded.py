"""Is a parameter there? Between forwards a sharding library takes it away."""

from __future__ import annotations

import torch
import torch.distributed
from torch import Tensor, nn


def is_dtensor(value: object) -> bool:
    """Imports torch.distributed.tensor, which is slow, only for tensors of an unusual class."""
    if type(value) in (Tensor, nn.Parameter) or not isinstance(value, Tensor):
        return False
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def refuse_dtensor(op: str, name: str, tensor: Tensor, remedy: str) -> None:
    """Raises TypeError, with what to do about it, if the tensor is a DTensor."""
    if is_dtensor(tensor):
        placements = ", ".join(map(str, tensor.placements))  # type: ignore[attr-defined]
        raise TypeError(f"{op}: {name} must not be a DTensor, got one with placements ({placements}): {remedy}")


def check_present(op: str, name: str, tensor: Tensor, remedy: str, *, shape: str = "", of_dtensor: str = "") -> None:
    """The tensor is whole and in memory, not what FSDP2, FSDP1 or ZeRO-3 leaves in its place.

    Args:
        remedy: what to do if it is not.
        shape: of a parameter, such as "[V, H]": then one axis alone is what is left of it.
        of_dtensor: what else may be done about a DTensor.

    Raises:
        TypeError: it is a DTensor.
        ValueError: it is a parameter that ZeRO-3 or FSDP has not gathered.
    """
    refuse_dtensor(op, name, tensor, remedy + of_dtensor)
    if shape and tensor.ndim == 1:
        raise ValueError(
            f"{op}: {name} must have shape {shape}, got {list(tensor.shape)}, which is what ZeRO-3 and FSDP1 leave of "
            f"a parameter that is not gathered: {remedy}"
        )
    if torch.compiler.is_compiling():
        return
    status = getattr(tensor, "ds_status", None)
    if status is not None and getattr(status, "name", "") != "AVAILABLE":
        raise ValueError(f"{op}: {name} is partitioned by ZeRO-3 (ds_status {status}): {remedy}")
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type == "meta":
        return
    if tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0:
        raise ValueError(
            f"{op}: the memory of {name} {list(tensor.shape)} is freed, as FSDP does outside of the forward: {remedy}"
        )
