"""Registration of ops with torch.library, and the choice of a backend.

Every op may have up to three implementations: "native" (C++ for the CPU, CUDA C++ for NVIDIA GPUs), "triton" and
"reference" (plain PyTorch, on any device). The public function resolves one and hands it to the op as its last
argument, so that the backward, which autograd runs in a thread of its own, takes the same one.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import operator
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import forward_ad

from grpo_kernels import _extension
from grpo_kernels._autocast import no_autocast
from grpo_kernels._direct import is_direct

BACKENDS = ("native", "triton", "reference")
MINIMUM_CAPABILITY = (8, 0)

LIBRARY = torch.library.Library("grpo_kernels", "DEF")  # type: ignore[no-untyped-call]


class BackendUnavailable(RuntimeError):
    """A backend was asked for that cannot serve this op, device or dtype; the message says why."""


@dataclass(frozen=True)
class Backends:
    """The backends of an op on each type of device, best first; "reference" follows them."""

    cpu: tuple[str, ...]
    cuda: tuple[str, ...]
    interpretable: bool  # its Triton kernels may run on CPU tensors under TRITON_INTERPRET=1


_registered: dict[str, Backends] = {}
_ops: dict[str, str] = {}
_resolved: dict[tuple[str, str | None, torch.device, torch.dtype], str] = {}
_forced: str | None = None


def register_backends(op: str, *, cpu: tuple[str, ...], cuda: tuple[str, ...], interpretable: bool = False) -> None:
    """States which kernels the public function `op` has."""
    _registered[op] = Backends(cpu, cuda, interpretable)


def define(schema: str, *, package: str, fake: Callable[..., Any], definition: str = "") -> torch._ops.OpOverload:
    """Registers one op: `schema` ends with `str backend`; `fake` gives the outputs' metadata and takes all arguments
    but that.

    The implementation is the function of the op's name in `<package>._native` or `<package>._triton`, imported at the
    first call. Ops that other ops are composed of have one for "reference", too: in the module `definition` of the
    package, never differentiated.
    """
    name = schema.partition("(")[0]

    def implementation(*arguments: Any) -> Any:
        if arguments[-1] != "reference":
            return _implementation(f"{package}._{arguments[-1]}", name)(*arguments[:-1])
        with no_autocast(arguments[0].device.type):
            return _implementation(f"{package}.{definition}", name)(*arguments[:-1])

    def fake_implementation(*arguments: Any) -> Any:
        return fake(*arguments[:-1])

    LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"{LIBRARY.ns}::{name}", fake_implementation, lib=LIBRARY)
    _ops[name] = package
    overload: torch._ops.OpOverload = getattr(torch.ops.grpo_kernels, name).default
    return overload


def direct(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """The op as it is called: past torch.library where that changes nothing but the time that a call takes."""
    name = op._schema.name.partition("::")[2]
    modules = {backend: f"{_ops[name]}._{backend}" for backend in ("native", "triton")}
    places = [place for place, argument in enumerate(op._schema.arguments) if "Tensor" in str(argument.type)]
    tensors = operator.itemgetter(*places, *places[:1])  # two at least: of one alone it would give no tuple

    def call(*arguments: Any) -> Any:
        module = modules.get(arguments[-1])
        if module is None or torch.compiler.is_compiling() or not is_direct(tensors(arguments)):
            return op(*arguments)
        return _implementation(module, name)(*arguments[:-1])

    return call


def unwatched(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """The op in a call of kernels whose tensors have a `_direct.signature`: what `direct` comes to, without asking."""
    name = op._schema.name.partition("::")[2]
    package = _ops[name]

    def call(*arguments: Any) -> Any:
        return _implementation(f"{package}._{arguments[-1]}", name)(*arguments[:-1])

    return call


@functools.cache
def _implementation(module: str, name: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def registered_ops() -> dict[str, str]:
    """Name of every op that was registered, and the package that holds it."""
    return dict(_ops)


def public_ops() -> dict[str, Backends]:
    """Every public function with kernels, and its backends."""
    return dict(_registered)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Makes every op in the block use one backend: "native", "triton" or "reference".

    An op that cannot use it raises `BackendUnavailable` with the reason; nothing falls back in silence. The choice is
    global to the process, not to a thread.

    Raises:
        ValueError: `name` is not a backend.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"backend: name must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    previous = _forced
    _forced = name
    try:
        yield
    finally:
        _forced = previous


def resolve(op: str, tensor: torch.Tensor) -> str:
    """The backend that `op` takes for data like `tensor`.

    Raises:
        BackendUnavailable: one was asked for with `backend(...)` and cannot be used.
        RuntimeError: a kernel would be called under forward-mode differentiation, whose tangents it would drop.
    """
    chosen: str = _resolve(op, _forced, tensor.device, tensor.dtype)
    if chosen != "reference":
        refuse_forward_mode(op, "kernels have", '; within grpo_kernels.backend("reference"), plain PyTorch has')
    return chosen


def refuse_forward_mode(op: str, subject: str, remedy: str = "") -> None:
    """Raises RuntimeError under forward-mode differentiation, whose tangents `subject` would drop."""
    if forward_ad._current_level >= 0:
        derivative = "no forward-mode derivative (torch.func.jvp, torch.autograd.forward_ad)"
        raise RuntimeError(f"{op}: {subject} {derivative}{remedy}")


def resolve_part(op: str, tensor: torch.Tensor, backend: str) -> str:
    """The backend that `op` takes as a part of another op, which runs on `backend`: its own best one, whatever was
    asked for, unless all is to be plain PyTorch."""
    if backend == "reference":
        return backend
    chosen: str = _resolve(op, None, tensor.device, tensor.dtype)
    return chosen


def _resolve(op: str, forced: str | None, device: torch.device, dtype: torch.dtype) -> str:
    key = (op, forced, device, dtype)
    chosen = _resolved.get(key)
    if chosen is None:
        index = -1 if device.index is None else device.index
        chosen = _resolved[key] = _choose(op, forced, device.type, index, dtype)
    return chosen


# What torch.compiler.assume_constant_result does: torch.compile takes the result and does not trace the look-up.
# Setting the attribute here saves the import of torch._dynamo (and with it Triton) when the package is imported.
_resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _choose(op: str, forced: str | None, device_type: str, index: int, dtype: torch.dtype) -> str:
    if forced is not None:
        reason = problem(op, forced, device_type, index, dtype)
        if reason:
            raise BackendUnavailable(f"{op}: backend {forced!r} cannot be used on {device_type}: {reason}")
        return forced
    for name in candidates(op, device_type):
        if not problem(op, name, device_type, index, dtype):
            return name
    return "reference"


def candidates(op: str, device_type: str) -> tuple[str, ...]:
    """The backends that `op` tries on a type of device, in order; "reference" is last and always works.

    Meta tensors take those of the CPU, of which nothing runs but what says how the outputs look: plain PyTorch could
    not look at their data.
    """
    backends = _registered[op]
    found = {"cpu": backends.cpu, "cuda": backends.cuda, "meta": backends.cpu}
    return (*found.get(device_type, ()), "reference")


def problem(op: str, name: str, device_type: str, index: int, dtype: torch.dtype) -> str:
    """Why `op` cannot use the backend `name` there, or "" if it can."""
    if name == "reference":
        return ""
    interpreted = name == "triton" and device_type == "cpu" and _registered[op].interpretable
    if name not in candidates(op, device_type) and not interpreted:
        return f"{op} has no {name} kernel for this device"
    if device_type == "meta":
        return ""
    if dtype == torch.float64 and (device_type != "cpu" or name == "triton"):
        return "its kernels do not take float64"
    if name == "native":
        return _extension.cpu_problem() if device_type == "cpu" else _extension.cuda_problem(index)
    return _triton_problem(device_type, index)


def _triton_problem(device_type: str, index: int) -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device_type == "cpu":
        return (
            "" if os.environ.get("TRITON_INTERPRET") == "1" else "Triton runs on the CPU only with TRITON_INTERPRET=1"
        )
    if torch.version.hip is None and torch.cuda.get_device_capability(index) < MINIMUM_CAPABILITY:
        return "it needs compute capability 8.0 or higher"
    return ""
