"""Where documents lie among the rows: arguments of the loss and of the module, checked and brought into one form."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_kernels import _checks
from grpo_kernels.grpo_loss.inputs import check_cu_seqlens

_FURTHEST = 2**62


class Documents(NamedTuple):
    """What `mtp_targets` takes.

    Attributes:
        positions: [N] int or None. The position of every row in its document; negative: of none.
        sequence_length: documents end at multiples of this; 0: they do not.
    """

    positions: Tensor | None
    sequence_length: int


def documents(op: str, token_ids: Any, positions: Any, cu_seqlens: Any) -> Documents:
    """Of token_ids [N] or [B, T], of which each row of the batch ends a document.

    Raises:
        TypeError, ValueError: one of the three is of the wrong type, dtype, shape or device; both positions and
            cu_seqlens are given, or cu_seqlens with a batch; on the CPU also if cu_seqlens falls or leaves [0, N].
    """
    _checks.check_tensor(op, "token_ids", token_ids)
    _checks.check_dtype(op, "token_ids", token_ids, _checks.INTEGER)
    _checks.check_ndim(op, "token_ids", token_ids, "[N]", "[B, T]")
    sequence_length = token_ids.shape[1] if token_ids.ndim == 2 else 0
    if positions is not None:
        if cu_seqlens is not None:
            raise ValueError(f"{op}: positions and cu_seqlens exclude each other, got both")
        _checks.check_tensor(op, "positions", positions)
        _checks.check_dtype(op, "positions", positions, _checks.INTEGER)
        symbol = "[B, T]" if token_ids.ndim == 2 else "[N]"
        _checks.check_shape(op, "positions", positions, (symbol, token_ids.shape))
        _checks.check_same_device(op, "positions", positions, "token_ids", token_ids)
        return Documents(positions.reshape(-1), sequence_length)
    if cu_seqlens is not None:
        return Documents(_positions(op, token_ids, cu_seqlens), 0)
    return Documents(None, sequence_length)


def check_shift(op: str, shift: int) -> int:
    """`shift`, an integer >= 0; one beyond the last row of any tensor as a number that the kernels hold."""
    _checks.check_integer(op, "shift", shift, minimum=0)
    return min(shift, _FURTHEST)


def _positions(op: str, token_ids: Tensor, cu_seqlens: Any) -> Tensor:
    """[N]. The rows' positions in the sequences that cu_seqlens cuts; -1 before the first and behind the last."""
    if token_ids.ndim != 1:
        raise ValueError(f"{op}: cu_seqlens is for packed token_ids [N], got {list(token_ids.shape)}")
    check_cu_seqlens(op, cu_seqlens, "token_ids", token_ids)
    _raise_faults(op, cu_seqlens, token_ids.shape[0])
    rows = torch.arange(token_ids.shape[0], device=token_ids.device, dtype=cu_seqlens.dtype)
    after = torch.searchsorted(cu_seqlens.contiguous(), rows, right=True)
    inside = (after > 0) & (after < cu_seqlens.shape[0])
    return torch.where(inside, rows - cu_seqlens[(after - 1).clamp(min=0)], -1)


def _raise_faults(op: str, cu_seqlens: Tensor, rows: int) -> None:
    """On the CPU, where looking is free."""
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    ends = cu_seqlens.tolist()
    if ends[0] < 0 or ends[-1] > rows or ends != sorted(ends):
        raise ValueError(f"{op}: cu_seqlens must rise within [0, N] = [0, {rows}] without a step down, got {ends}")
