"""Inputs of every op for the contract tests: one module per op, found by name.

A module defines
    OPS        {registered op: [argument tuples]}, without the backend: for opcheck, metadata, poison, determinism
    CALLS      [Call]: public calls that must work, compile and not depend on luck
    BAD_CALLS  [BadCall]: public calls that must raise, and what the message says
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Call:
    """A public call, `function(*make(device))`; `differentiable` lists the inputs that get gradients."""

    name: str
    function: Callable[..., Any]
    make: Callable[[str], tuple[Any, ...]]
    differentiable: tuple[int, ...] = field(default=())


@dataclass(frozen=True)
class BadCall:
    """A public call that must raise `error` with a message that contains all of `says`."""

    name: str
    call: Callable[[], Any]
    error: type[Exception]
    says: tuple[str, ...]


def modules() -> dict[str, ModuleType]:
    """Every op's samples, by the name of its package."""
    return {info.name: importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)}


def tensors(value: Any) -> list[Tensor]:
    """The tensors of a (nested) result, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in tensors(item)]
    return []
