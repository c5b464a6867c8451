"""The permutation in plain PyTorch: the definition, the oracle in float64, and the fallback on any device.

No shape depends on the routes, and nothing is read on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from grpo_kernels.moe_permute.maps import check_maps, check_rows, readable


def row_bound(slots: int, experts: int, alignment: int) -> int:
    """R: rows that hold `slots` tokens' copies for at most `experts` experts, each filled up to the alignment."""
    if alignment == 1:
        return slots
    # A comparison of a size that is not known would be a fact that compiled code then depends on.
    smaller = torch.sym_min if isinstance(slots, torch.SymInt) else min
    rows: int = slots + smaller(experts, slots) * (alignment - 1)
    return rows - rows % alignment


def build_permutation(
    topk_ids: Tensor, num_experts: int, first: int, last: int, alignment: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """row_id_map, inv_map, offsets, tokens_per_expert. An id outside [first, last) has no row."""
    experts, slots = last - first, topk_ids.numel()
    ids = topk_ids.reshape(-1).to(torch.int64)
    live = (ids >= first) & (ids < min(last, num_experts))
    key = torch.where(live, ids - first, experts)  # those without a row come last
    order = torch.argsort(key, stable=True)
    counts = torch.zeros(experts + 1, dtype=torch.int64, device=ids.device).scatter_add_(0, key, torch.ones_like(key))
    padded = (counts[:experts] + (alignment - 1)) // alignment * alignment
    offsets = padded.cumsum(0)
    # How far each expert's rows lie from where the sorting put them.
    shift = F.pad(offsets - padded, (0, 1)) - (counts.cumsum(0) - counts)
    rows = row_bound(slots, experts, alignment)
    place = torch.arange(slots, device=ids.device) + shift[key[order]]
    place = torch.where(live[order], place, rows)
    inv_map = torch.full((rows + 1,), -1, dtype=torch.int32, device=ids.device)
    inv_map = inv_map.scatter(0, place, order.to(torch.int32))[:rows].contiguous()
    row_of_slot = torch.where(place < rows, place, -1).to(torch.int32)
    row_id_map = torch.empty_like(row_of_slot).scatter(0, order, row_of_slot).view(topk_ids.shape)
    return row_id_map, inv_map, offsets.to(torch.int32), counts[:experts].to(torch.int32)


def moe_permute(x: Tensor, row_id_map: Tensor, inv_map: Tensor, topk_weights: Tensor | None = None) -> Tensor:
    """[R, H]. The copy of its token in every row, times its slot's weight, 0 in the rows that are padding or of no
    slot."""
    if readable(x):
        check_maps("moe_permute", row_id_map, inv_map)
    tokens, top_k = row_id_map.shape
    live = (inv_map >= 0) & (inv_map < tokens * top_k)
    source = torch.where(live, inv_map // max(top_k, 1), tokens)
    wide = x.to(_accumulation(x))  # the gradient sums a token's rows, and rounds once
    rows = F.pad(wide, (0, 0, 0, 1)).index_select(0, source)
    if topk_weights is not None:
        slot = torch.where(live, inv_map, tokens * top_k)
        rows = rows * F.pad(topk_weights.reshape(-1).to(wide.dtype), (0, 1)).index_select(0, slot)[:, None]
    return rows.to(x.dtype)


def moe_unpermute(y: Tensor, row_id_map: Tensor, topk_weights: Tensor | None) -> Tensor:
    """[T, H]. The sum of a token's rows, weighted, in slot order. A row that is not there is no row."""
    if readable(y):
        check_rows("moe_unpermute", row_id_map, y.shape[0])
    live = (row_id_map >= 0) & (row_id_map < y.shape[0])
    wide = F.pad(y.to(_accumulation(y)), (0, 0, 0, 1))
    source = torch.where(live, row_id_map, y.shape[0])
    total = torch.zeros((row_id_map.shape[0], y.shape[1]), dtype=wide.dtype, device=y.device)
    for slot in range(row_id_map.shape[1]):
        term = wide.index_select(0, source[:, slot])
        if topk_weights is not None:  # a weight that belongs to no row counts for nothing, whatever it is
            weight = torch.where(live[:, slot], topk_weights[:, slot].to(wide.dtype), 0.0)
            term = term * weight[:, None]
        total = total + term
    return total.to(y.dtype)


def _accumulation(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32
