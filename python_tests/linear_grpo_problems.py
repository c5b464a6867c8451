"""Problems for linear_grpo_loss, and its definition from all logits in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import grpo_kernels
from grpo_kernels import GRPOLossConfig, LoRAFactors, grpo_loss, linear_grpo_loss
from grpo_kernels.grpo_loss.metrics import NAMES
from grpo_kernels.linear_log_probs import policy
from grpo_kernels.testing import assert_as_accurate
from python_tests.samples.grpo_loss import batch, pack

LENGTHS = (9, 4, 1, 0, 7)
WIDTH, VOCAB, RANK, LORA_SCALE = 12, 37, 3, 0.7
EVERY = ("hidden", "weight", "bias", "a", "b")
Problem = dict[str, Tensor | None]


@contextmanager
def two_passes() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy, "passes", lambda *_, **__: 2)
        yield


def log_probs_of(p: Problem, dtype: torch.dtype, temperature: Any = 1.0, scale: float = 1.0, softcap: Any = None):
    """What plain PyTorch makes of the leaves: log-probs and entropy; masked rows are cut out before."""
    live = (p["mask"] if p["mask"] is not None else torch.ones_like(p["ids"], dtype=torch.bool)) & (p["ids"] >= 0)
    x = p["hidden"][live].to(dtype)
    bias = None if p.get("bias") is None else p["bias"].to(dtype)
    z = F.linear(x, p["weight"].to(dtype), bias)
    if p.get("a") is not None:
        z = z + LORA_SCALE * F.linear(F.linear(x, p["a"].to(dtype)), p["b"].to(dtype))
    z = z * scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    per_row = isinstance(temperature, Tensor) and temperature.ndim > 0
    z = z / (temperature[live][:, None].to(dtype) if per_row else temperature)
    every = torch.log_softmax(z, -1)
    chosen = every.gather(-1, p["ids"][live][:, None])[:, 0]
    zeros = torch.zeros(live.shape, dtype=dtype)
    return zeros.masked_scatter(live, chosen), zeros.masked_scatter(live, -(every.exp() * every).sum(-1)), live


def problem(variant: str = "ppo", *, packed: bool = False, seed: int = 0) -> tuple[Problem, dict[str, Any]]:
    """All inputs in float64, old and other log-probs around those of the head; and options of the call."""
    inputs = batch(variant, lengths=LENGTHS, seed=seed)
    options: dict[str, Any] = {}
    if packed:
        inputs, cu_seqlens = pack(inputs)
        options["cu_seqlens"] = cu_seqlens
        outside = (torch.arange(len(inputs["mask"])) < cu_seqlens[0]) | (
            torch.arange(len(inputs["mask"])) >= cu_seqlens[-1]
        )
        inputs["mask"] = inputs["mask"].masked_fill(outside, False)
    generator = torch.Generator().manual_seed(seed)
    shape = inputs["mask"].shape

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=generator) * scale).double()

    p: Problem = {
        "hidden": normal(*shape, WIDTH), "weight": normal(VOCAB, WIDTH, scale=0.4), "bias": normal(VOCAB),
        "a": normal(RANK, WIDTH, scale=0.3), "b": normal(VOCAB, RANK, scale=0.3),
        "ids": torch.randint(VOCAB, shape, generator=generator),
    }  # fmt: skip
    shift = log_probs_of({**p, "mask": inputs["mask"]}, torch.float64)[0] - inputs["log_probs"].nan_to_num()
    for name in ("old_log_probs", "ref_log_probs", "sampler_log_probs"):
        if inputs[name] is not None:
            inputs[name] = (inputs[name] + shift).float().double()
    return {**{name: value for name, value in inputs.items() if name not in ("log_probs", "entropy")}, **p}, options


def cast(p: Problem, dtype: torch.dtype, *, half: torch.dtype | None = None) -> Problem:
    """Floating tensors in another dtype; hidden states and head in `half`."""

    def one(name: str, value: Tensor | None) -> Tensor | None:
        if value is None or not value.is_floating_point():
            return value
        return value.to(half if half is not None and name in EVERY else dtype)

    return {name: one(name, value) for name, value in p.items()}


def leaves_of(p: Problem, trained: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: p[name].detach().clone().requires_grad_(name in trained) for name in EVERY if p[name] is not None}


def call(p: Problem, config: GRPOLossConfig, **options: Any) -> Any:
    """linear_grpo_loss on a problem."""
    lora = LoRAFactors(p["a"], p["b"], LORA_SCALE) if p.get("a") is not None else None
    return linear_grpo_loss(
        p["hidden"], p["weight"], p["ids"], p["old_log_probs"], p["advantages"], p["mask"], config, bias=p.get("bias"),
        lora=lora, ref_log_probs=p["ref_log_probs"], sampler_log_probs=p["sampler_log_probs"],
        token_weights=p["token_weights"], **options,
    )  # fmt: skip


def run(
    p: Problem, config: GRPOLossConfig, *, upstream: float = -1.7, trained: tuple[str, ...] = EVERY, **options: Any
) -> tuple[Any, dict[str, Tensor]]:
    """The output, and the gradients of all leaves."""
    leaves = leaves_of(p, trained)
    output = call({**p, **leaves}, config, **options)
    slope = torch.full_like(output.loss, upstream) * torch.linspace(1, 2, output.loss.numel()).view(output.loss.shape)
    wanted = [leaves[name] for name in trained]
    gradients = torch.autograd.grad(output.loss, wanted, slope.to(output.loss), materialize_grads=True)
    return output, dict(zip(trained, gradients, strict=True))


def definition(
    p: Problem, config: GRPOLossConfig, dtype: torch.dtype, *, upstream: float = -1.7, temperature: Any = 1.0,
    logit_scale: float = 1.0, softcap: float | None = None, **options: Any,
) -> tuple[Any, dict[str, Tensor]]:  # fmt: skip
    """The same from all logits, with plain PyTorch alone."""
    leaves = leaves_of(p, EVERY)
    log_probs, entropy, live = log_probs_of({**p, **leaves}, dtype, temperature, logit_scale, softcap)
    others = cast({name: p[name] for name in ("ref_log_probs", "sampler_log_probs", "token_weights")}, dtype)
    old = None if p["old_log_probs"] is None else p["old_log_probs"].to(dtype)
    with grpo_kernels.backend("reference"):
        output = grpo_loss(
            log_probs, old, p["advantages"].to(dtype), live, config, entropy=entropy, **others, **options
        )
    slope = torch.full_like(output.loss, upstream) * torch.linspace(1, 2, output.loss.numel()).view(output.loss.shape)
    gradients = torch.autograd.grad(output.loss, list(leaves.values()), slope.to(dtype), materialize_grads=True)
    return output._replace(log_probs=log_probs, entropy=entropy), dict(zip(leaves, gradients, strict=True))


def assert_close(actual: tuple[Any, dict[str, Tensor]], expected: tuple[Any, dict[str, Tensor]]) -> None:
    """In float64: roundings apart."""
    tolerance = {"rtol": 1e-10, "atol": 1e-12}
    for name in ("loss", "log_probs", "entropy"):
        torch.testing.assert_close(getattr(actual[0], name), getattr(expected[0], name).detach(), **tolerance)
    values = zip(actual[0].metrics.values, expected[0].metrics.values, NAMES, strict=True)
    for value, other, name in values:
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    for name, gradient in actual[1].items():
        torch.testing.assert_close(gradient, expected[1][name], **tolerance)


def judge(actual: list[Any], expected: list[Any], eager: list[Any]) -> None:
    """Draws are judged together, tensors each relative to its own size: else a large one, which eager may have met by
    chance, would set the budget of all. Scalars may be sums that cancel, and stay as they are."""

    def joined(results: list[Any], name: str) -> Tensor:
        return torch.cat([value / size for value, size in zip(values_of(results, name), sizes, strict=True)])

    def values_of(results: list[Any], name: str) -> list[Tensor]:
        values = [getattr(r[0], name) if name in r[0]._fields else r[1][name] for r in results]
        return [value.detach().flatten() for value in values]

    for name in ("loss", "log_probs", "entropy", *EVERY):
        exact = values_of(expected, name)
        sizes = [value.abs().max().item() if value.numel() > 1 and value.any() else 1.0 for value in exact]
        a, e, plain = (joined(results, name) for results in (actual, expected, eager))
        assert_as_accurate(a, e.double(), plain, name=name)
