"""Pages about trainers: their code, run against stand-ins that have the trainers' signatures."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_kernels.testing import assert_as_accurate

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page: str) -> list[str]:
    """The Python blocks of a page, in order."""
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


def run(page: str, index: int = 0) -> dict[str, Any]:
    """Executes one block of a page as it stands; returns its names."""
    names: dict[str, Any] = {"__name__": f"docs.{page}"}
    exec(compile(blocks(page)[index], str(DOCS / page), "exec", dont_inherit=True), names)
    return names


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: Any) -> ModuleType:
    """A module of that name, with its packages, for as long as the test runs."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        path = ".".join(parts[:end])
        if not getattr(sys.modules.get(path), "is_stand_in", False):
            module = ModuleType(path)
            module.is_stand_in = True  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, path, module)
        if end > 1:
            setattr(sys.modules[".".join(parts[: end - 1])], parts[end - 1], sys.modules[path])
    for key, value in attributes.items():
        setattr(sys.modules[name], key, value)
    return sys.modules[name]


def signature(text: str) -> inspect.Signature:
    """The signature that `def f<text>` has."""
    names: dict[str, Any] = {}
    exec(f"def f{text}: ...", names)
    return inspect.signature(names["f"])


def assert_signature(function: Callable[..., Any], text: str) -> None:
    """Names, order, kinds and defaults are the trainer's."""
    assert str(inspect.signature(function)) == text


def arguments(text: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """What a call with these arguments gives every parameter of that signature."""
    bound = signature(text).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def assert_equal_to(
    actual: Callable[[Tensor], Tensor], definition: Callable[[Tensor, torch.dtype], Tensor], at: Tensor
) -> None:
    """Value and gradient of `actual` at a float32 point, against the definition in float64 (and float32, as eager)."""

    def both(function: Callable[[Tensor], Tensor], point: Tensor) -> tuple[Tensor, Tensor]:
        point = point.detach().clone().requires_grad_()
        value = function(point)
        (gradient,) = torch.autograd.grad(value, point)
        return value.detach(), gradient

    found = both(actual, at)
    expected = both(lambda point: definition(point, torch.float64), at.double())
    eager = both(lambda point: definition(point, torch.float32), at)
    for name, a, b, c in zip(("loss", "gradient"), found, expected, eager, strict=True):
        assert_as_accurate(a, b, c, name=name)


def ragged(batch: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    """Log-probs of three policies, advantages and a mask with an empty row: enough spread for every clip to matter."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    log_probs = -normal(batch, length).abs() - 0.05
    old = log_probs + 0.5 * normal(batch, length)
    lengths = torch.randint(1, length + 1, (batch, 1), generator=generator)
    lengths[batch // 2] = 0
    return {
        "log_probs": log_probs,
        "old": old.clamp(max=-0.01),
        "sampler": (old + 0.4 * normal(batch, length)).clamp(max=-0.01),
        "ref": (log_probs + 0.7 * normal(batch, length)).clamp(max=-0.01),
        "advantages": normal(batch, 1).expand(batch, length) + 0.1 * normal(batch, length),
        "mask": (torch.arange(length) < lengths) & (torch.rand(batch, length, generator=generator) < 0.9),
    }
