"""Is the weight of a language-model head there?"""

from __future__ import annotations

from typing import Any

from grpo_kernels import _checks
from grpo_kernels._sharded import check_present

REMEDY = (
    "call the op in the forward of the module that owns the weight; grpo_kernels.FusedLMHead wraps a head so that the "
    "hooks of FSDP2, DDP and ZeRO-3 gather and reduce it"
)
_OF_DTENSOR = (
    ". Where each rank holds a part of the vocabulary: pass its local part and "
    "vocab_shard=VocabShard.from_dtensor(weight, mesh_dim)"
)


def check_weight(op: str, weight: Any, remedy: str = REMEDY) -> None:
    """`weight` is a matrix with its data in memory, not what a sharding library leaves in its place.

    Raises:
        TypeError: it is no tensor, or a DTensor.
        ValueError: it is a parameter that ZeRO-3 or FSDP has not gathered, or no matrix.
    """
    _checks.check_tensor(op, "weight", weight)
    check_present(op, "weight", weight, remedy, shape="[V, H]", of_dtensor=_OF_DTENSOR)
    _checks.check_ndim(op, "weight", weight, "[V, H]")
