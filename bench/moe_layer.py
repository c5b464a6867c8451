"""A layer's inputs, and ours of it: what the cases of every recipe share."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

import grpo_kernels

from . import moe_definitions as definitions
from .bench_moe_router import routed
from .case import Inputs
from .moe_definitions import Model, Values

GPU_TOKENS, CPU_TOKENS = 8192, 1024
_MARGIN = 0.02  # no route hangs on how exactly the router's logits are computed, not even in bf16


def _normal(dtype: torch.dtype, device: str, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=device) * scale).to(dtype)


def make(model: Model, tokens: int, dtype: torch.dtype, backward: bool, device: str, size: str) -> Inputs:
    model, tokens = (model, tokens) if size == "full" else (definitions.tiny(model), 24)
    normal = partial(_normal, dtype, device)
    made = {"router": normal(model.experts, model.hidden, scale=(1.0 if model.biased else 2.0) * model.hidden**-0.5)}
    if model.clamped:
        made["router_bias"] = normal(model.experts, scale=0.5)
    parameters = {"gate_up": (model.hidden, 2 * model.width), "down": (model.width, model.hidden)}
    for name, (into, out) in parameters.items():
        shape = (into, out) if model.clamped else (out, into)
        made[name] = normal(model.experts, *shape, scale=into**-0.5)
        if model.clamped:
            made[f"{name}_bias"] = normal(model.experts, out, scale=0.3)
    candidates = {"x": normal(4 * tokens, model.hidden)}
    bias = torch.randn(model.experts, device=device) * 0.01 + 0.3 if model.biased else None
    good = definitions.settled(definitions.router_logits(made | candidates), model, bias, _margin(model))
    made = {"x": definitions.settle(candidates["x"], good, tokens)} | made
    for value in made.values():
        value.requires_grad_(backward)
    if backward:
        made["upstream"] = normal(tokens, model.hidden)
    return made if bias is None else made | {"correction": bias}


def _margin(model: Model) -> float:
    """Sigmoid scores lie closer together than logits."""
    return _MARGIN / 20 if model.biased else _MARGIN


def experts(model: Model, inputs: Inputs, routes: Any, **options: Any) -> Tensor:
    """moe_experts with the activation of the model and parameters as its checkpoints have them."""
    x, up, down = inputs["x"], inputs["gate_up"], inputs["down"]
    if not model.clamped:
        return grpo_kernels.moe_experts(x, up, down, routes, **options)
    return grpo_kernels.moe_experts(
        x,
        up.transpose(1, 2),
        down.transpose(1, 2),
        routes,
        gate_up_bias=inputs["gate_up_bias"],
        down_bias=inputs["down_bias"],
        activation="clamped_swiglu",
        swiglu_alpha=definitions.ALPHA,
        swiglu_limit=definitions.LIMIT,
        interleaved=True,
        **options,
    )


def ours(model: Model, inputs: Inputs, **options: Any) -> Values:
    """Router and experts; `options` are moe_experts'."""
    return (experts(model, inputs, routed(definitions.router_logits(inputs), model, inputs), **options),)
