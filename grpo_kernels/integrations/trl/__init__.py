"""TRL's trainers on the kernels of grpo_kernels.

`patch()` serves every trainer of TRL 1.16 as it is: its fused head and its functions of logits compute with
`linear_token_log_probs` and `token_log_probs`. `FusedGRPOTrainer` computes GRPO's loss, too, in the kernels. TRL is
imported when one of them is used.
"""

from typing import Any

from grpo_kernels.integrations._patch import IncompatibleVersion
from grpo_kernels.integrations.trl.patching import is_patched, patch, patched, unpatch
from grpo_kernels.integrations.trl.version import require_trl

__all__ = ["FusedGRPOTrainer", "IncompatibleVersion", "is_patched", "patch", "patched", "unpatch"]


def __getattr__(name: str) -> Any:
    if name == "FusedGRPOTrainer":
        require_trl()
        from grpo_kernels.integrations.trl.trainer import FusedGRPOTrainer

        return FusedGRPOTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
