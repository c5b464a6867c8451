"""Log-probs of chosen tokens, entropy and other statistics of each token's distribution, from logits."""

from grpo_kernels.token_log_probs.api import TokenLogProbsOutput, token_log_probs

__all__ = ["TokenLogProbsOutput", "token_log_probs"]
