"""The language-model head without logits: log-probs, cross-entropy and the GRPO loss straight from hidden states."""

from grpo_kernels.linear_log_probs.api import linear_token_log_probs
from grpo_kernels.linear_log_probs.head import LoRAFactors

__all__ = ["LoRAFactors", "linear_token_log_probs"]
