"""Multi-token prediction: the loss of all depths in one pass.

The modules that predict further ahead are in `.module`; `grpo_kernels` exports them as `MultiTokenPrediction`.
"""

from grpo_kernels.multi_token_prediction.api import mtp_linear_cross_entropy
from grpo_kernels.multi_token_prediction.outputs import MTPLossOutput, PolicyTerms

__all__ = ["MTPLossOutput", "PolicyTerms", "mtp_linear_cross_entropy"]
