"""Liger's losses under Liger's names and with its arguments, computed by this package; Liger itself is not needed.

Code moves by changing an import: `docs/liger.md` has an example and every difference.
"""

from grpo_kernels.integrations.liger.cross_entropy import CrossEntropyOutput, LigerFusedLinearCrossEntropyLoss
from grpo_kernels.integrations.liger.fused_linear import LigerFusedLinearGRPOLoss
from grpo_kernels.integrations.liger.logits import fused_selective_log_softmax, triton_grpo_loss
from grpo_kernels.integrations.liger.scaled_cross_entropy import (
    LigerFusedLinearScaledCrossEntropyFunction,
    LigerFusedLinearScaledCrossEntropyTPFunction,
)

__all__ = [
    "CrossEntropyOutput",
    "LigerFusedLinearCrossEntropyLoss",
    "LigerFusedLinearGRPOLoss",
    "LigerFusedLinearScaledCrossEntropyFunction",
    "LigerFusedLinearScaledCrossEntropyTPFunction",
    "fused_selective_log_softmax",
    "triton_grpo_loss",
]
