"""What every backend needs to know of its arguments: rows that can be read where they lie, and ids of no expert."""

from __future__ import annotations

from torch import Tensor

from grpo_kernels._checks import position
from grpo_kernels.moe_permute.reference import row_bound

MAX_EXPERTS = 1024


def check_sizes(op: str, slots: int, experts: int, num_experts: int, alignment: int) -> None:
    """What the maps can number: `slots` = T * K, and the rows of `experts` of the `num_experts`, in 32 bits.

    Raises:
        ValueError: there is more.
    """
    if num_experts > MAX_EXPERTS:
        raise ValueError(f"{op}: num_experts must be <= {MAX_EXPERTS}, got {num_experts}")
    rows = row_bound(slots, experts, alignment)
    if slots >= 2**31 or rows >= 2**31:
        raise ValueError(f"{op}: T * K and R must be < 2^31, got {slots} and {rows}; split the batch")


def dense_rows(values: Tensor) -> Tensor:
    """[N, H] values whose last axis is dense, copied where it is not."""
    return values if values.stride(1) == 1 or values.shape[1] <= 1 else values.contiguous()


def raise_outside(topk_ids: Tensor, slot: int, num_experts: int) -> None:
    """Names the id, the `slot`-th, that is of no expert."""
    where, value = position("topk_ids", topk_ids.shape, slot), topk_ids.reshape(-1)[slot].item()
    raise ValueError(
        f"build_permutation: {where} must be < num_experts = {num_experts}, or negative for no expert, got {value}"
    )
