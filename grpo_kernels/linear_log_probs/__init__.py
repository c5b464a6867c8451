"""The language-model head without logits: log-probs, cross-entropy and the GRPO loss straight from hidden states."""

from grpo_kernels.linear_log_probs.api import linear_token_log_probs
from grpo_kernels.linear_log_probs.cross_entropy import linear_cross_entropy
from grpo_kernels.linear_log_probs.grpo import linear_grpo_loss
from grpo_kernels.linear_log_probs.head import LoRAFactors

__all__ = ["LoRAFactors", "linear_cross_entropy", "linear_grpo_loss", "linear_token_log_probs"]
