"""moe_router against the gates of DeepSeek-V3, Qwen3 and gpt-oss in eager PyTorch: topk, gather, counts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import grpo_kernels

from . import moe_definitions as definitions
from .case import Case, Inputs, Provider, compiled
from .moe_definitions import DEEPSEEK, GPT_OSS, QWEN, Model, Values
from .target import ALLOCATION, Target, device_time, host_cost, speedup

_TOKENS = 4096
_SEQUENCES = 8
_MARGIN = 1e-5  # far above the rounding of float32, and no bf16 logits tie
_LOSSES = ("z_loss", "aux_loss", "seq_aux_loss")

Forward = Callable[[Inputs], Values]


def routed(logits: Tensor, model: Model, inputs: Inputs, **more: Any) -> grpo_kernels.RouterOutput:
    """Ours, with the gate of the model."""
    if not model.biased:
        return grpo_kernels.moe_router(logits, model.top_k, scoring_func=model.scoring, **more)
    return grpo_kernels.moe_router(
        logits,
        model.top_k,
        scoring_func=model.scoring,
        e_score_correction_bias=inputs["correction"],
        n_group=model.groups,
        topk_group=model.kept_groups,
        routed_scaling_factor=model.scale,
        **more,
    )


def _ours(model: Model, losses: bool, inputs: Inputs) -> Values:
    """Weights and losses, which have a gradient; then ids and counts."""
    more: dict[str, Any] = {f"{name}_coef": 1.0 for name in _LOSSES} if losses else {}
    if losses:
        more["cu_seqlens"] = inputs["cu_seqlens"]
    result = routed(inputs["logits"], model, inputs, **more)
    found = tuple(getattr(result, name) for name in _LOSSES if losses)
    return (result.topk_weights, *found, result.topk_ids, result.tokens_per_expert)


def _eager(model: Model, losses: bool, inputs: Inputs) -> Values:
    logits = inputs["logits"]
    weights, ids = definitions.route(logits, model, inputs.get("correction"))
    counts = definitions.counts_of(ids, logits.shape[1])
    found = definitions.balance_losses(logits, ids, counts, inputs, model) if losses else ()
    return (weights, *found, ids.int(), counts)


def _both(forward: Forward, losses: bool, inputs: Inputs) -> Values:
    return definitions.with_gradients(forward(inputs), inputs, ("grad_weights", *(_LOSSES if losses else ())))


def _make(
    model: Model, tokens: int, dtype: torch.dtype, backward: bool, losses: bool, device: str, size: str
) -> Inputs:
    tokens = tokens if size == "full" else 24
    model = model if size == "full" else definitions.tiny(model)
    made: Inputs = {"logits": torch.randn(2 * tokens, model.experts, device=device).mul_(1.5).to(dtype)}
    if model.biased:
        made["correction"] = torch.randn(model.experts, device=device) * 0.01 + 0.3
    good = definitions.settled(made["logits"], model, made.get("correction"), _MARGIN)
    made["logits"] = definitions.settle(made["logits"], good, tokens).requires_grad_(backward)
    if backward:
        made["grad_weights"] = torch.randn(tokens, model.top_k, device=device)
    if losses:
        made |= {name: torch.tensor(0.5, device=device) for name in _LOSSES} | _sequences(tokens, device)
    return made


def _sequences(tokens: int, device: str) -> Inputs:
    """Packed sequences of lengths that differ."""
    ends = torch.linspace(0, 1, _SEQUENCES + 1).pow(1.5).mul(tokens).round().int()
    lengths = ends.diff().long()
    sequence = torch.arange(_SEQUENCES).repeat_interleave(lengths)
    return {"cu_seqlens": ends.to(device), "lengths": lengths.to(device), "sequence": sequence.to(device)}


def _targets(device: str, backward: bool) -> tuple[Target, ...]:
    if device == "cpu":
        return (speedup(2),)
    return () if backward else (device_time(8),)


def case(
    device: str,
    model: Model,
    dtype: torch.dtype,
    *,
    tokens: int = _TOKENS,
    backward: bool = True,
    losses: bool = False,
) -> Case:
    """The gate of a model."""
    ours, eager = partial(_ours, model, losses), partial(_eager, model, losses)

    def run(forward: Forward) -> Forward:
        return partial(_both, forward, losses) if backward else forward

    width = torch.empty((), dtype=dtype).element_size()
    numbers = 8 * model.top_k  # weight and id of each slot
    forward_bytes = tokens * (model.experts * width + numbers)
    parts = ("fwd+bwd" if backward else "fwd") + (" + losses" if losses else "")
    return Case(
        op="moe_router",
        name=f"{model.name} T={tokens} E={model.experts} K={model.top_k} {str(dtype).removeprefix('torch.')} {parts}",
        make=partial(_make, model, tokens, dtype, backward, losses),
        providers=(
            Provider("ours", run(ours), "ours"),
            Provider("eager", run(eager), "eager"),
            Provider("torch.compile", run(compiled(eager)), "compile"),
        ),
        bytes_moved=forward_bytes + backward * (2 * tokens * model.experts * width + tokens * numbers),
        targets=_targets(device, backward),
        definition=lambda inputs: definitions.sample(run(eager)(inputs)),
        sample_outputs=definitions.sample,
        quick=model is DEEPSEEK and not losses,
    )


class _Allocation(torch.autograd.Function):
    """The least that an op with these outputs, and what its backward needs, costs the host."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, top_k: int) -> tuple[Tensor, ...]:
        tokens, experts = logits.shape
        weights = logits.new_empty((tokens, top_k), dtype=torch.float32)
        ids = logits.new_empty((tokens, top_k), dtype=torch.int32)
        counts = logits.new_empty((experts,), dtype=torch.int32)
        losses, balance = (logits.new_empty(shape, dtype=torch.float32) for shape in ((3,), (0, experts)))
        mismatch, live = (logits.new_empty((), dtype=torch.int32) for _ in range(2))
        ctx.mark_non_differentiable(ids, counts, mismatch)
        ctx.save_for_backward(logits, weights, ids, balance, live)
        return weights, ids, counts, losses, mismatch


def _host_case(device: str) -> Case:
    model = QWEN
    return Case(
        op="moe_router",
        name="host cost of a forward, 4x16 float32",
        make=lambda device, size: {"logits": torch.randn(4, 16, device=device, requires_grad=True)},
        providers=(
            Provider("ours", partial(_ours, model, False), "ours"),
            Provider("eager", partial(_eager, model, False), "eager"),
            Provider(ALLOCATION, lambda inputs: _Allocation.apply(inputs["logits"], model.top_k), "part"),
        ),
        targets=(host_cost(device),),
        clock="host",
        definition=lambda inputs: definitions.sample(_eager(model, False, inputs)),
        sample_outputs=definitions.sample,
    )


def cases(device: str) -> list[Case]:
    """The gate of each model, in float32 as DeepSeek has it and in bf16; one with its balance losses."""
    return [
        case(device, DEEPSEEK, torch.float32, backward=False),
        case(device, DEEPSEEK, torch.float32),
        case(device, DEEPSEEK, torch.float32, losses=True),
        case(device, QWEN, torch.bfloat16, backward=False),
        case(device, QWEN, torch.bfloat16),
        case(device, GPT_OSS, torch.bfloat16),
        _host_case(device),
    ]
