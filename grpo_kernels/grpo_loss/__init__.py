"""The GRPO loss: every published variant as one map from log-probs to a loss and its derivative."""

from grpo_kernels.grpo_loss.api import GRPOLossOutput, grpo_loss
from grpo_kernels.grpo_loss.config import GRPOLossConfig
from grpo_kernels.grpo_loss.metrics import GRPOMetrics

__all__ = ["GRPOLossConfig", "GRPOLossOutput", "GRPOMetrics", "grpo_loss"]
