"""Is the weight of a language-model head there? Between forwards a sharding library takes it away."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from grpo_kernels.distributed.vocab import is_dtensor

REMEDY = (
    "call the op in the forward of the module that owns the weight; grpo_kernels.FusedLMHead wraps a head so that the "
    "hooks of FSDP2, DDP and ZeRO-3 gather and reduce it"
)


def check_weight(op: str, weight: Any, remedy: str = REMEDY) -> None:
    """`weight` is a matrix with its data in memory, not what a sharding library leaves in its place.

    Raises:
        TypeError: it is no tensor.
        ValueError: it is a DTensor, a parameter that ZeRO-3 or FSDP has not gathered, or no matrix.
    """
    plain = type(weight) is Tensor or type(weight) is nn.Parameter
    if not plain:
        _check_class(op, weight, remedy)
    if weight.ndim != 2:
        found = f"{op}: weight must have shape [V, H], got {list(weight.shape)}"
        if weight.ndim == 1:
            found += f", which is what ZeRO-3 and FSDP1 leave of a parameter that is not gathered: {remedy}"
        raise ValueError(found)
    if torch.compiler.is_compiling():
        return
    status = getattr(weight, "ds_status", None)
    if status is not None and getattr(status, "name", "") != "AVAILABLE":
        raise ValueError(f"{op}: weight is partitioned by ZeRO-3 (ds_status {status}): {remedy}")
    if plain and weight.untyped_storage().nbytes() == 0 and weight.numel() > 0 and weight.device.type != "meta":
        raise ValueError(
            f"{op}: the memory of weight {list(weight.shape)} is freed, as FSDP does outside of the forward: {remedy}"
        )


def _check_class(op: str, weight: Any, remedy: str) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"{op}: weight must be a torch.Tensor, got {type(weight).__name__}")
    if is_dtensor(weight):
        placements = ", ".join(map(str, weight.placements))  # type: ignore[attr-defined]
        raise ValueError(
            f"{op}: weight is a DTensor with placements ({placements}). Where FSDP2 sharded it: {remedy}. Where each "
            "rank holds a part of the vocabulary: pass its local part and vocab_shard=VocabShard.from_dtensor(weight, "
            "mesh_dim)"
        )
