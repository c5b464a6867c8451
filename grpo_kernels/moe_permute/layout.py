"""What every backend needs to know of its arguments: rows that can be read where they lie, and ids of no expert."""

from __future__ import annotations

from torch import Tensor

from grpo_kernels.token_log_probs.layout import position


def dense_rows(values: Tensor) -> Tensor:
    """[N, H] values whose last axis is dense, copied where it is not."""
    return values if values.stride(1) == 1 or values.shape[1] <= 1 else values.contiguous()


def raise_outside(topk_ids: Tensor, slot: int, num_experts: int) -> None:
    """Names the id, the `slot`-th, that is of no expert."""
    where, value = position("topk_ids", topk_ids.shape, slot), topk_ids.reshape(-1)[slot].item()
    raise ValueError(
        f"build_permutation: {where} must be < num_experts = {num_experts}, or negative for no expert, got {value}"
    )
