"""Routed experts in FP8, forward and backward, stage by stage; and the stages are those, in their order, of the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import grpo_kernels
from python_tests.gpu.fuzz.compare import same_bits
from python_tests.gpu.fuzz.problems import Dice
from python_tests.gpu.fuzz.stages import Ran, Recorder, check_stages, copies


class Experts(NamedTuple):
    """A random layer, and the options of a call."""

    leaves: dict[str, Tensor]
    ids: Tensor
    options: dict[str, Any]
    upstream: Tensor
    accumulate: bool

    def run(self, device: str) -> tuple[list[Tensor], list[Ran]]:
        """The result and every gradient; and what ran."""
        given = {name: value.clone().to(device).requires_grad_() for name, value in self.leaves.items()}
        totals = [torch.ones(given[n].shape, device=device) if self.accumulate else None for n in ("gate_up", "down")]
        options = {**self.options, **({"weight_grad_accumulators": tuple(totals)} if self.accumulate else {})}
        biases = {name: given[name] for name in ("gate_up_bias", "down_bias") if name in given}
        routes = given["weights"], self.ids.to(device)
        with Recorder() as recorder:
            out = grpo_kernels.moe_experts(
                given["x"], given["gate_up"], given["down"], routes, recipe="fp8_block128", **biases, **options
            )
            out.backward(self.upstream.to(device))
        found = [out.detach(), *(leaf.grad for leaf in given.values() if leaf.grad is not None)]
        return copies([*found, *(t for t in totals if t is not None)]), recorder.ran


def layer(dice: Dice) -> Experts:
    """Few tokens: what takes long is the comparison."""
    hidden, width = dice.number(2, 300), dice.number(1, 200)
    experts, tokens = dice.number(2, 8), dice.number(1, 120)
    top_k = dice.number(1, min(experts, 4) + 1)
    dtype = dice.one_of(torch.bfloat16, torch.bfloat16, torch.float16)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape) * scale).to(dtype)

    leaves = {
        "x": normal(tokens, hidden),
        "gate_up": normal(experts, 2 * width, hidden, scale=hidden**-0.5),
        "down": normal(experts, hidden, width, scale=width**-0.5),
        "weights": torch.rand(tokens, top_k),
    }
    biased, clamped, accumulate = dice.flags(3)
    if biased:
        leaves |= {"gate_up_bias": normal(experts, 2 * width), "down_bias": normal(experts, hidden)}
    ids = torch.rand(tokens, experts).topk(top_k).indices
    ids[torch.rand(ids.shape) < dice.one_of(0.0, 0.2)] = -1
    options = {
        "fp8_wgrad": bool(dice.number(0, 2)),
        "save": dice.one_of("preact", "preact", "input"),
        "activation": "clamped_swiglu" if clamped else "swiglu",
        "interleaved": bool(dice.number(0, 2)),
    }
    return Experts(leaves, ids, options, normal(tokens, hidden), accumulate)


def experts(dice: Dice) -> tuple[str, Callable[[str], None]]:
    """What the problem is, and the check of it on a device."""
    problem = layer(dice)
    shapes = {name: list(value.shape) for name, value in problem.leaves.items()}

    def check(device: str) -> None:
        found, ran = problem.run(device)
        for index, (a, b) in enumerate(zip(found, problem.run(device)[0], strict=True)):
            same_bits(f"result {index} of equal calls", a, b)
        check_stages(ran)
        order = [step.op for step in problem.run("cpu")[1]]
        assert [step.op for step in ran] == order, f"other ops than on the CPU: {[step.op for step in ran]}, {order}"

    return f"{shapes} {problem.options} accumulate={problem.accumulate}", check
