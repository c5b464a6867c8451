"""grpo_loss, forward and backward, against the loss as a trainer writes it.

Ours returns thirty metrics with the loss. The eager loss computes none, which is in its favour; "eager with metrics"
adds the handful that trainers log.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import grpo_kernels

from .case import Case, Inputs, Provider, compiled, with_gradients
from .target import ALLOCATION, Target, figure, host_cost, speedup

_SHAPES = ((64, 4096), (8, 1024))
_SMOKE = (3, 7)
_NAMES = ("log_probs", "old_log_probs", "ref_log_probs", "advantages", "mask")


@dataclass(frozen=True)
class _Variant:
    """A setting of ours and the same loss in PyTorch."""

    config: grpo_kernels.GRPOLossConfig
    policy: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    reduce: Callable[[Tensor, Tensor], Tensor]
    log_ratio: Callable[[Tensor, Tensor, Tensor], Tensor]


def _token_log_ratio(log_probs: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    return log_probs - old


def _sequence_log_ratio(log_probs: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    return ((log_probs - old) * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)


def _clipped(low: float, high: float, log_ratio: Tensor, advantages: Tensor) -> Tensor:
    ratio = torch.exp(log_ratio)
    return -torch.min(ratio * advantages, torch.clamp(ratio, 1 - low, 1 + high) * advantages)


def _token_clip(low: float, high: float, log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return _clipped(low, high, _token_log_ratio(log_probs, old, mask), advantages)


def _sequence_clip(low: float, high: float, log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return _clipped(low, high, _sequence_log_ratio(log_probs, old, mask), advantages)


def _capped(cap: float, log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    ratio = torch.exp(log_probs - old).clamp(max=cap).detach()
    return -ratio * advantages * log_probs


def _token_mean(loss: Tensor, mask: Tensor) -> Tensor:
    return (loss * mask).sum() / mask.sum().clamp(min=1)


def _sequence_mean(loss: Tensor, mask: Tensor) -> Tensor:
    return ((loss * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()


def _preset(name: str, **overrides: Any) -> grpo_kernels.GRPOLossConfig:
    return grpo_kernels.GRPOLossConfig.preset(name, **overrides)


_VARIANTS = {
    "clip + k3": _Variant(_preset("bnpo", kl_coef=0.04), partial(_token_clip, 0.2, 0.2), _token_mean, _token_log_ratio),
    "dapo": _Variant(_preset("dapo"), partial(_token_clip, 0.2, 0.28), _token_mean, _token_log_ratio),
    "gspo": _Variant(_preset("gspo"), partial(_sequence_clip, 3e-4, 4e-4), _sequence_mean, _sequence_log_ratio),
    "cispo": _Variant(_preset("cispo"), partial(_capped, 5.0), _token_mean, _token_log_ratio),
}


def _ours(variant: _Variant, inputs: Inputs) -> Tensor:
    return grpo_kernels.grpo_loss(
        inputs["log_probs"],
        inputs["old_log_probs"],
        inputs["advantages"],
        inputs["mask"],
        variant.config,
        ref_log_probs=inputs["ref_log_probs"] if variant.config.kl_coef else None,
    ).loss


def _token_losses(
    variant: _Variant, log_probs: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor | None]:
    loss = variant.policy(log_probs, old, advantages[:, None], mask.to(log_probs.dtype))
    if not variant.config.kl_coef:
        return loss, None
    gap = ref - log_probs
    kl = torch.exp(gap) - gap - 1
    return loss + variant.config.kl_coef * kl, kl


def _eager(variant: _Variant, log_probs: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    loss, _ = _token_losses(variant, log_probs, old, ref, advantages, mask)
    return variant.reduce(loss, mask.to(loss.dtype))


def _eager_with_metrics(
    variant: _Variant, log_probs: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, mask: Tensor
) -> Tensor:
    """Clip fractions, mean ratio, mean KL: as tensors, so that nothing waits for the device."""
    loss, kl = _token_losses(variant, log_probs, old, ref, advantages, mask)
    weight = mask.to(loss.dtype)
    with torch.no_grad():
        tokens = weight.sum().clamp(min=1)
        ratio = torch.exp(variant.log_ratio(log_probs, old, weight))
        low = (ratio < 1 - variant.config.clip_low) & (advantages[:, None] < 0)
        high = (ratio > 1 + (variant.config.clip_high or variant.config.clip_low)) & (advantages[:, None] > 0)
        for value in (low, high, low | high, ratio, kl):
            if value is not None:
                (value * weight).sum() / tokens
    return variant.reduce(loss, weight)


def _both(loss: Callable[[Inputs], Tensor], inputs: Inputs) -> Sequence[Tensor]:
    return with_gradients([loss(inputs)], [inputs["upstream"]], inputs["log_probs"])


def _plain(function: Callable[..., Tensor]) -> Callable[[Inputs], Sequence[Tensor]]:
    return partial(_both, lambda inputs: function(*(inputs[name] for name in _NAMES)))


def _make(shape: tuple[int, int], device: str, size: str) -> Inputs:
    batch, tokens = shape if size == "full" else _SMOKE
    log_probs = -torch.rand(batch, tokens, device=device) * 4
    lengths = torch.randint(tokens // 2, tokens + 1, (batch, 1), device=device)
    return {
        "log_probs": log_probs.clone().requires_grad_(),
        "old_log_probs": log_probs + 0.1 * torch.randn_like(log_probs),
        "ref_log_probs": log_probs + 0.3 * torch.randn_like(log_probs),
        "advantages": torch.randn(batch, device=device),
        "mask": torch.arange(tokens, device=device) < lengths,
        "upstream": torch.ones((), device=device),
    }


def _targets(device: str, variant: str, shape: tuple[int, int]) -> tuple[Target, ...]:
    if device != "cuda":
        return (speedup(3),)
    if shape != _SHAPES[0]:
        return ()
    # The backward multiplies the stored gradient by the upstream scalar: a launch of PyTorch's that is not the op's.
    return (Target("forward <= 10 us on the device", 10.0, figure("median_us", "ours, forward"), at_least=False),)


def case(device: str, shape: tuple[int, int], name: str) -> Case:
    """A variant on [B, T] tokens, forward and backward."""
    variant = _VARIANTS[name]
    eager = partial(_eager, variant)
    providers = [
        Provider("ours", partial(_both, partial(_ours, variant)), "ours"),
        Provider("ours, forward", lambda inputs: (_ours(variant, inputs),), "part"),
        Provider("eager", _plain(eager), "eager"),
        Provider("torch.compile", _plain(compiled(eager)), "compile"),
        Provider("eager with metrics", _plain(partial(_eager_with_metrics, variant)), "peer"),
    ]
    elements = shape[0] * shape[1]
    reads = 3 if variant.config.kl_coef else 2
    return Case(
        op="grpo_loss",
        name=f"{shape[0]}x{shape[1]} {name}",
        make=partial(_make, shape),
        providers=tuple(providers),
        # log-probs and mask read, gradient written by the forward; read and written once more by the backward
        bytes_moved=elements * (4 * reads + 1 + 4 + 8),
        targets=_targets(device, name, shape),
        quick=name == "clip + k3",
        memory=4 * elements if name == "clip + k3" else None,
    )


class _Allocation(torch.autograd.Function):
    """The least that an op with these outputs, and what its backward needs, costs the host."""

    @staticmethod
    def forward(ctx: Any, log_probs: Tensor) -> tuple[Tensor, Tensor]:
        gradient = torch.empty_like(log_probs)
        ctx.save_for_backward(gradient)
        return log_probs.new_empty(()), log_probs.new_empty(30)


def _host_case(device: str) -> Case:
    variant = _VARIANTS["clip + k3"]
    return Case(
        op="grpo_loss",
        name="host cost of a forward, 4x16 clip + k3",
        make=lambda device, size: _make((4, 16), device, "full"),
        providers=(
            Provider("ours", lambda inputs: (_ours(variant, inputs),), "ours"),
            Provider("eager", lambda inputs: (_eager(variant, *(inputs[name] for name in _NAMES)),), "eager"),
            Provider(ALLOCATION, lambda inputs: _Allocation.apply(inputs["log_probs"]), "part"),
        ),
        targets=(host_cost(device),),
        clock="host",
    )


def cases(device: str) -> list[Case]:
    """The clipped loss with KL at two sizes, three other variants at the larger, and what a call costs the host."""
    return [
        case(device, _SHAPES[0], "clip + k3"),
        case(device, _SHAPES[1], "clip + k3"),
        *(case(device, _SHAPES[0], name) for name in ("dapo", "gspo", "cispo")),
        _host_case(device),
    ]
