"""Memory of a layer's routed experts and of eager PyTorch's in this process, in bytes above inputs and results: what is
held between forward and backward, and the peak of both. As JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

import grpo_kernels
from bench import moe_definitions
from bench.memory import bytes_of, growth_cpu, held_cpu

TOKENS = 1024
MODEL = replace(moe_definitions.QWEN, name="memory", experts=16, hidden=512, width=192)
Inputs = dict[str, Tensor]
Forward = Callable[[Inputs], Tensor]


def make(dtype: torch.dtype = torch.float32) -> Inputs:
    """Tokens, experts and routes, which all need gradients."""
    torch.manual_seed(0)
    weights, ids = torch.randn(TOKENS, MODEL.experts).softmax(-1).topk(MODEL.top_k)
    made = {
        "x": torch.randn(TOKENS, MODEL.hidden).to(dtype),
        "gate_up": (torch.randn(MODEL.experts, 2 * MODEL.width, MODEL.hidden) * MODEL.hidden**-0.5).to(dtype),
        "down": (torch.randn(MODEL.experts, MODEL.hidden, MODEL.width) * MODEL.width**-0.5).to(dtype),
        "weights": weights,
    }
    for value in made.values():
        value.requires_grad_()
    return made | {"ids": ids, "upstream": torch.randn(TOKENS, MODEL.hidden).to(dtype)}


def ours(save: str, inputs: Inputs, recipe: str = "bf16") -> Tensor:
    routes = (inputs["weights"], inputs["ids"])
    return grpo_kernels.moe_experts(inputs["x"], inputs["gate_up"], inputs["down"], routes, recipe=recipe, save=save)


def eager(inputs: Inputs) -> Tensor:
    return moe_definitions.experts_in_turn(inputs["x"], inputs["weights"], inputs["ids"], inputs, MODEL)


FORWARDS: dict[str, Forward] = {
    "preact": partial(ours, "preact"),
    "input": partial(ours, "input"),
    "preact fp8": partial(ours, "preact", recipe="fp8_block128"),
    "input fp8": partial(ours, "input", recipe="fp8_block128"),
    "eager": eager,
}


def _both(forward: Forward, inputs: Inputs) -> Sequence[Tensor]:
    leaves = [value for value in inputs.values() if value.requires_grad]
    output = forward(inputs)
    return [output.detach(), *torch.autograd.grad(output, leaves, inputs["upstream"])]


def main() -> None:
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make(dtype)
        for name, forward in FORWARDS.items():
            label = f"{name} {str(dtype).removeprefix('torch.')}"
            for what, measure, work in (
                ("held", held_cpu, lambda run=forward, given=inputs: [run(given)]),
                ("peak", growth_cpu, lambda run=forward, given=inputs: _both(run, given)),
            ):
                growth, results = measure(work)
                found[f"{label}, {what}"] = max(growth - bytes_of(results, inputs.values()), 0)
                del results
    print(json.dumps(found))


if __name__ == "__main__":
    main()
