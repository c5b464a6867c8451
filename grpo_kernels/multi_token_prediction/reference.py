"""Multi-token prediction in plain PyTorch: the definition, and the fallback on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def _document(rows: Tensor, positions: Tensor | None, sequence_length: int) -> tuple[Tensor, Tensor]:
    """[N] each. For every row a number of its document, and whether it belongs to one."""
    first = rows == 0
    if sequence_length > 0:
        first = first | (rows % sequence_length == 0)
    if positions is None:
        return first.cumsum(0), torch.ones_like(first)
    inside = positions >= 0
    goes_on = torch.zeros_like(first)
    goes_on[1:] = inside[:-1] & inside[1:] & (positions[1:] - 1 == positions[:-1])
    return (first | ~goes_on).cumsum(0), inside


def mtp_targets(
    token_ids: Tensor,
    positions: Tensor | None,
    mask: Tensor | None,
    depths: int,
    shift: int,
    sequence_length: int,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """The token that row i of depth k predicts, that of row i + k + shift, and how many there are: see `ops`."""
    rows = torch.arange(token_ids.shape[0], device=token_ids.device)
    document, inside = _document(rows, positions, sequence_length)
    counts = (token_ids >= 0) & (token_ids.long() != ignore_index)  # int32 would wrap it
    if mask is not None:
        counts = counts & mask
    targets = torch.full((depths, token_ids.shape[0]), -1, dtype=torch.int64, device=token_ids.device)
    for k in range(depths):
        ahead = min(k + shift, token_ids.shape[0])
        behind = token_ids.shape[0] - ahead
        valid = counts[ahead:] & inside[:behind] & (document[ahead:] == document[:behind])
        targets[k, :behind] = torch.where(valid, token_ids[ahead:], -1)
    return targets, (targets >= 0).sum(1)
