"""What ops over several ranks share: the check of their group, and the rows of all its ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from torch import Tensor


def check_group(op: str, name: str, group: Any) -> None:
    """`group` is one that this rank is in, or None for all ranks."""
    if torch.compiler.is_compiling():
        return
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise ValueError(f"{op}: {name} needs torch.distributed; call init_process_group first")
    if group is not None and not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(
            f"{op}: {name} must be a torch.distributed.ProcessGroup that this rank is in, or None, got "
            f"{type(group).__name__}"
        )


def all_gather(values: Tensor, group: torch.distributed.ProcessGroup | None) -> Tensor:
    """The rows of every rank, [world * rows, ...], in the order of the ranks."""
    world = torch.distributed.get_world_size(group)
    gathered = values.new_empty((world * values.shape[0], *values.shape[1:]))
    distributed: Any = torch.distributed
    gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor  # its older name
    gather(gathered, values.contiguous(), group=group)
    return gathered
