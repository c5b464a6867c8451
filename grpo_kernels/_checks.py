"""Argument checks: each raises before a kernel starts, naming the op, the argument, what it expected and what came."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

import torch

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""The element types that ops accept."""
INTEGER = (torch.int64, torch.int32)


_Check = TypeVar("_Check", bound=Callable[..., None])


def remembered(check: _Check) -> _Check:
    """A check of options alone, made once for the same values of the same types; never of tensors or sequences."""
    passed = functools.lru_cache(maxsize=256, typed=True)(check)

    def run(*options: Any) -> None:
        if torch.compiler.is_compiling():
            return check(*options)
        try:
            return passed(*options)
        except TypeError:  # an option is of the wrong type, or cannot be looked up
            return check(*options)

    return cast(_Check, run)


def check_tensor(op: str, name: str, value: Any) -> None:
    """`value` is a tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")


def check_dtype(op: str, name: str, tensor: torch.Tensor, allowed: Sequence[torch.dtype] = FLOATING) -> None:
    """The element type is one of `allowed`."""
    if tensor.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise TypeError(f"{op}: {name} must have dtype {names}, got {str(tensor.dtype).removeprefix('torch.')}")


def check_shape(op: str, name: str, tensor: torch.Tensor, *allowed: tuple[str, Sequence[int]]) -> None:
    """The shape is one of `allowed`, each a symbolic form such as "[B, T]" and its sizes in this call."""
    found = tuple(tensor.shape)
    for _, shape in allowed:
        if found == tuple(shape):
            return
    wanted = " or ".join(f"{symbol} = {list(shape)}" for symbol, shape in allowed)
    raise ValueError(f"{op}: {name} must have shape {wanted}, got {list(tensor.shape)}")


def check_ndim(op: str, name: str, tensor: torch.Tensor, *allowed: str) -> None:
    """The number of dimensions is that of one of the symbolic forms `allowed`, such as "[B, T]"."""
    for symbol in allowed:
        if tensor.ndim == symbol.count(",") + 1:
            return
    raise ValueError(f"{op}: {name} must have shape {' or '.join(allowed)}, got {list(tensor.shape)}")


def check_same_device(op: str, name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Both tensors are on one device."""
    if tensor.device != other.device:
        raise ValueError(f"{op}: {name} must be on {other.device} like {other_name}, got {tensor.device}")


def check_choice(op: str, name: str, value: Any, choices: Iterable[Any]) -> None:
    """`value` is one of `choices`."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_number(
    op: str, name: str, value: Any, *, minimum: float = -math.inf, above: float = -math.inf, maximum: float = math.inf
) -> None:
    """`value` is a finite number with minimum <= value <= maximum and value > above."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    if not (minimum <= value <= maximum and value > above and -math.inf < value < math.inf):
        bounds = [f">= {minimum:g}"] if minimum > -math.inf else []
        bounds += [f"> {above:g}"] if above > -math.inf else []
        bounds += [f"<= {maximum:g}"] if maximum < math.inf else []
        raise ValueError(f"{op}: {name} must be finite{''.join(' and ' + bound for bound in bounds)}, got {value}")


def check_integer(op: str, name: str, value: Any, *, minimum: int) -> None:
    """`value` is an integer >= minimum."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{op}: {name} must be >= {minimum}, got {value}")


def scalar_argument(
    op: str, name: str, value: Any, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor | None, float]:
    """A coefficient that may change from step to step, as the pair (`Tensor? x_tensor`, `float x`) of an op's schema.

    A 0-d tensor stays on its device, so that no step reads it on the host. A number stays a number, except while
    torch.compile traces: there it becomes a 0-d tensor, since a number in a schema would be compiled into the graph,
    once for every value.
    """
    if isinstance(value, torch.Tensor):
        if value.ndim != 0:
            raise ValueError(f"{op}: {name} must be a number or a 0-d tensor, got shape {list(value.shape)}")
        if value.device != device:
            raise ValueError(f"{op}: {name} must be on {device}, got {value.device}")
        return value.detach().to(dtype), 0.0
    if torch.compiler.is_compiling():
        # A product, because the compiler turns it into tensor arithmetic; torch.full would be specialised to the value.
        return torch.ones((), device=device, dtype=dtype) * value, 0.0
    check_number(op, name, value)
    return None, float(value)


def position(name: str, shape: torch.Size, row: int) -> str:
    """How messages name one element of a tensor, by its place in the flattened tensor."""
    index: list[int] = []
    for size in reversed(shape):
        index.insert(0, row % size)
        row //= size
    return f"{name}{index}" if index else name
