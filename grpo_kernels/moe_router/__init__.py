"""Routing of tokens to experts, differentiable, with replay of earlier routes and the balance losses."""

from grpo_kernels.moe_router.api import RouterOutput, moe_router

__all__ = ["RouterOutput", "moe_router"]
