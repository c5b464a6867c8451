"""Inputs of every op for the contract tests: one module per op, found by name.

A module defines
    OPS        {registered op: [argument tuples]}, without the backend: for opcheck, metadata, poison, determinism
    CALLS      [Call]: public calls that must work, compile and not depend on luck
    BAD_CALLS  [BadCall]: public calls that must raise, and what the message says
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Call:
    """A public call, `function(*make(device))`.

    Attributes:
        differentiable: the inputs that get gradients.
        autocast: the inputs that autocast casts, as for `F.linear`. () = autocast changes nothing.
        rounds: a narrow dtype through which gradients may pass inside a kernel: on two devices they agree to two
            roundings to it, relative to the largest element, since sums of rounded terms cancel.
        in_stages: it rounds to FP8 between its ops, so that sums that differ in the last bit end in other codes: on two
            devices its ops agree, each given the same operands.
    """

    name: str
    function: Callable[..., Any]
    make: Callable[[str], tuple[Any, ...]]
    differentiable: tuple[int, ...] = field(default=())
    autocast: tuple[int, ...] = ()
    rounds: torch.dtype | None = None
    in_stages: bool = False


@dataclass(frozen=True)
class BadCall:
    """A public call that must raise `error` with a message that contains all of `says`."""

    name: str
    call: Callable[[], Any]
    error: type[Exception]
    says: tuple[str, ...]


def modules() -> dict[str, ModuleType]:
    """Every op's samples, by the name of its package."""
    names = [info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_")]
    return {name: importlib.import_module(f"{__name__}.{name}") for name in names}


def tensors(value: Any) -> list[Tensor]:
    """The tensors of a (nested) result, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in tensors(item)]
    return []


def multiplies_matrices(name: str) -> bool:
    """Whether an op, or a test of one, is of those that are made of a library's matrix products on the CPU.

    Such products are equal from run to run, but not for every number of threads: that is up to library and processor.
    """
    return any(part in name for part in ("linear_", "multi_token_prediction", "mtp_", "grouped_gemm", "moe_experts"))


def assert_gradients_agree(call: Call, actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Gradients of two backends: equal to rounding, each element, or to two roundings of the largest (`rounds`)."""
    for a, b in zip(actual, expected, strict=True):
        tolerance = {}
        if call.rounds is not None:
            size = b.double().nan_to_num(0.0, 0.0, 0.0).abs().max().item() if b.numel() else 0.0
            tolerance = {"rtol": 0.0, "atol": 2 * torch.finfo(call.rounds).eps * size}
        torch.testing.assert_close(a.cpu(), b.cpu(), equal_nan=True, **tolerance)


def results_and_gradients(call: Call) -> list[Tensor]:
    """What a call on the CPU returns, and the gradients of its inputs by the sum of that."""
    inputs = list(call.make("cpu"))
    for index in call.differentiable:
        inputs[index] = inputs[index].detach().clone().requires_grad_()
    torch.manual_seed(0)
    outputs = tensors(call.function(*inputs))
    live = [output for output in outputs if output.requires_grad]
    leaves = [inputs[index] for index in call.differentiable]
    return [*outputs, *(torch.autograd.grad(sum(output.sum() for output in live), leaves) if live else ())]
