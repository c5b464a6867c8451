"""The language-model heads that the cases of the linear ops share: inputs, leaves, and how an op is called on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

import grpo_kernels
from grpo_kernels import _dispatch
from grpo_kernels.testing.verification.case import (
    BFLOAT16,
    FLOAT32,
    FLOAT64,
    GRADIENT,
    Inputs,
    Outputs,
    gradients,
    leaf,
)

TRAINING = (FLOAT32, BFLOAT16, FLOAT64)
EXACT = (FLOAT32, FLOAT64)
HEAD = ("hidden", "weight", "bias", "lora_a", "lora_b")
WIDTH = 72
_LORA_SCALE = 0.5
Change = Callable[[Inputs], None]


class Run(Protocol):
    """Calls an op on inputs, with options of its own, and takes gradients of what is not frozen."""

    def __call__(self, inputs: Inputs, options: Mapping[str, Any], frozen: tuple[str, ...]) -> Outputs: ...


def head(
    generator: torch.Generator, leading: tuple[int, ...], width: int, vocab: int, spread: float, optional: str
) -> Inputs:
    """Hidden states and a head whose logits have about this standard deviation; `optional` names bias and lora."""

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    made: Inputs = {"hidden": normal(*leading, width), "weight": normal(vocab, width, scale=spread / width**0.5)}
    if "bias" in optional:
        made["bias"] = normal(vocab, scale=spread / 2)
    if "lora" in optional:
        made["lora_a"] = normal(5, width, scale=1 / width**0.5)
        made["lora_b"] = normal(vocab, 5, scale=spread / 2)
    return made


def call(function: Callable[..., Any], inputs: Inputs, options: Mapping[str, Any]) -> Any:
    """The op, with `lora_a` and `lora_b` of the inputs as it wants them."""
    given = {**inputs, **options}
    if "lora_a" in given:
        given["lora"] = grpo_kernels.LoRAFactors(given.pop("lora_a"), given.pop("lora_b"), _LORA_SCALE)
    return function(**given)


def leaves_of(inputs: Inputs, frozen: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: leaf(inputs[name]) for name in HEAD if name in inputs and name not in frozen}


def accumulated(op: str, inputs: Inputs, values: Callable[[Inputs, Mapping[str, Any]], dict[str, Tensor]]) -> Outputs:
    """Values and gradients, that of the weight through an accumulator which is not empty at the start.

    The definition has no accumulator: there the gradient is added by hand. What is left is rounded to the dtype of the
    weight, as an optimizer would see it.
    """
    leaves = leaves_of(inputs, ())
    exact = torch.float64 if inputs["weight"].dtype == torch.float64 else torch.float32
    begun = torch.linspace(-1.0, 1.0, inputs["weight"].numel(), device=inputs["weight"].device, dtype=exact)
    begun = begun.view(inputs["weight"].shape)
    if _dispatch.resolve(op, inputs["hidden"]) == "reference":
        result = gradients(values({**inputs, **leaves}, {}), leaves)
        total = begun + result[GRADIENT + "weight"].to(exact)
    else:
        total = begun.clone()
        result = gradients(values({**inputs, **leaves}, {"weight_grad_accumulator": total}), leaves)
    result[GRADIENT + "weight"] = total.to(inputs["weight"].dtype)
    return result
