"""A case of the verification: inputs, a call, and the tensors by which it is judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]
Outputs = dict[str, Tensor]

FLOAT32, BFLOAT16, FLOAT16, FLOAT64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
EVERY_DTYPE = (FLOAT32, BFLOAT16, FLOAT16, FLOAT64)
GRADIENT = "gradient of "
"""How the names of gradients start: they have the dtype of the inputs, values have the op's."""
ROWS = "rows of "
"""How the names of values start that have the dtype of the inputs."""


@dataclass(frozen=True)
class Case:
    """One call of a public function.

    Args:
        op: The public function.
        name: Unique among the cases of the op.
        make: The inputs, on the CPU, from a seeded generator. Their floating tensors are rounded to the dtype under
            test and moved to the device under test.
        run: Calls the op on such inputs, which it must leave as they are, and returns what to compare: values first,
            then `gradients`.
        dtypes: Those to test. Everywhere float64 is left out where a backend does not take it.
        seeds: How many batches are judged together. The error of a single number, such as a loss, would be luck.
        rounds_between: Whether results of matrix products are rounded to a narrow dtype before others use them. The
            definition's error in that dtype then sets the budget, instead of that in float32.
    """

    op: str
    name: str
    make: Callable[[torch.Generator], Inputs]
    run: Callable[[Inputs], Outputs]
    dtypes: tuple[torch.dtype, ...] = EVERY_DTYPE
    seeds: int = 1
    rounds_between: bool = False


def leaf(value: Tensor) -> Tensor:
    """The tensor as a leaf of autograd that shares its memory, so that a write to it shows."""
    return value.detach().requires_grad_()


def gradients(outputs: Mapping[str, Tensor], leaves: Mapping[str, Tensor]) -> Outputs:
    """The outputs, detached, and the leaves' gradients of an uneven weighting of those that have one.

    The weights are multiples of 1/8 in [-5/8, 10/8], some of them 0: exact in every dtype and on every device.
    """
    used = [output for output in outputs.values() if output.requires_grad]
    weights = []
    for place, output in enumerate(used):
        index = torch.arange(output.numel(), device=output.device)
        weights.append((((index * 5 + place * 3) % 16 - 5) / 8).to(output.dtype).view(output.shape))
    result = {name: output.detach() for name, output in outputs.items()}
    slopes = torch.autograd.grad(used, list(leaves.values()), weights, materialize_grads=True)
    result.update({GRADIENT + name: slope for name, slope in zip(leaves, slopes, strict=True)})
    return result
