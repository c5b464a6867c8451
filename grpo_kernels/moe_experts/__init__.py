"""Routed experts: gate-up projection, activation, down projection and the weighted sum of each token's experts."""

from grpo_kernels.moe_experts.api import moe_experts

__all__ = ["moe_experts"]
