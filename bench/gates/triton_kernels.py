"""The Triton kernels, compiled as their launchers launch them.

The launchers of an op run on meta tensors, which have shapes, strides and an offset but no memory, while every launch
is recorded. Triton itself then says what is special about the arguments (types, multiples of 16, ones) and compiles; a
driver that only names an architecture stands in for the GPU.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from unittest import mock

from bench.gates import binary
from bench.gates.gate import ARCHITECTURES, Gate, Measured


@dataclass(frozen=True)
class Specialisation:
    """One compiled form of a kernel: for each argument its type and what Triton knows of the value, and the options."""

    kernel: str
    arguments: tuple[tuple[str, str, object], ...]
    options: tuple[tuple[str, object], ...]

    @property
    def warps(self) -> int:
        """Warps of a program."""
        return cast(int, dict(self.options).get("num_warps", 4))

    def constant(self, name: str) -> Any:
        """The value that is compiled into the code, None if there is none."""
        return next(value if kind == "constexpr" else None for n, kind, value in self.arguments if n == name)

    def aligned(self, *names: str) -> bool:
        """Whether all of these are known to be multiples of 16 (bytes of an address, or the number)."""
        return all(value == "D" for n, _, value in self.arguments if n in names)

    def text(self) -> str:
        """In words, for messages."""
        types = [f"{n}: {kind}" for n, kind, _ in self.arguments if kind[0] == "*"]
        constants = [f"{n}={value}" for n, kind, value in self.arguments if kind == "constexpr"]
        loose = [n for n, kind, value in self.arguments if kind[0] in "*i" and value != "D"]
        options = [f"{n}={value}" for n, value in self.options]
        return f"{self.kernel}({', '.join([*types, *constants, *options])}; not aligned: {' '.join(loose)})"


@dataclass(frozen=True)
class TritonKernels:
    """The launchers of an op, and the gates of what they launch.

    Attributes:
        launch: calls the launchers on meta tensors with every shipped combination (argument True: a few of them).
        gate: the limits of a specialisation.
        constants: kernel -> its constexpr arguments -> the values that the launchers give them, all of them.
        first: kernel -> the first architecture that it is launched on, where that is not sm_80. It is compiled for that
            one, too.
    """

    launch: Callable[[bool], None]
    gate: Callable[[Specialisation], Gate]
    constants: Mapping[str, Mapping[str, frozenset[object]]]
    first: Mapping[str, int] = field(default_factory=dict)

    def architectures(self) -> tuple[int, ...]:
        """Those that its kernels are compiled for."""
        return tuple(sorted({*ARCHITECTURES, *self.first.values()}))

    def kernels(self, architecture: int) -> frozenset[str]:
        """Those that are compiled for an architecture."""
        common = architecture in ARCHITECTURES
        return frozenset(
            name
            for name in self.constants
            if (self.first.get(name, 0) <= architecture if common else self.first.get(name) == architecture)
        )


@dataclass(frozen=True)
class Launch:
    """A recorded launch: all that is needed to compile it."""

    specialisation: Specialisation
    function: Any
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]


class _Driver:
    """What Triton asks of a GPU before it compiles."""

    def __init__(self, architecture: int) -> None:
        self._architecture = architecture

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._architecture, 32)

    def get_current_device(self) -> int:
        return self._architecture  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def _target(architecture: int) -> Iterator[None]:
    from triton.runtime import driver

    before = driver._active
    driver.set_active(_Driver(architecture))
    try:
        yield
    finally:
        driver.set_active(before)


def problem() -> str:
    """Why Triton kernels cannot be compiled here; empty if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "with TRITON_INTERPRET=1 nothing can be compiled"
    return binary.problem()


def compiler() -> str:
    """The compiler and its version, such as "Triton 3.8.0"."""
    import triton

    return f"Triton {triton.__version__}"


def specialise(function: Any, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> Specialisation:
    """What Triton would make of a launch with these arguments."""
    bound, special, rest = function.create_binder()[-1](*arguments, **options)
    described = tuple((name, *pair) for name, pair in zip(bound, special, strict=True))
    given = tuple((name, value) for name, value in sorted(rest.items()) if value is not None)
    return Specialisation(function.__name__, described, given)


def record(launch: Callable[[], None], architecture: int = 80) -> list[Launch]:
    """What `launch` launches for an architecture, each specialisation once."""
    from triton.runtime.jit import JITFunction

    found: dict[Specialisation, Launch] = {}

    def run(function: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        specialisation = specialise(function, arguments, options)
        found.setdefault(specialisation, Launch(specialisation, function, arguments, options))

    with _target(architecture), mock.patch.object(JITFunction, "run", run):
        launch()
    return list(found.values())


def compiled(launch: Launch, architecture: int) -> Any:
    """Triton's compiled kernel of a launch."""
    with _target(architecture):
        return launch.function.warmup(*launch.arguments, grid=(1,), **launch.options)


def compile_launch(launch: Launch, architecture: int) -> Measured:
    """What Triton makes of a launch."""
    found = compiled(launch, architecture)
    ((registers, stack, opcodes),) = binary.contents(found.asm["cubin"], of_triton=True).values()
    return Measured(registers, binary.local_bytes(opcodes), stack, found.metadata.shared, opcodes)


def declared_kernels(folder: Path) -> set[str]:
    """Names of the jitted functions below a folder that no other jitted function calls: those that are launched."""
    jitted: dict[str, ast.FunctionDef] = {}
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list):
                jitted[node.name] = node
    calls = (call.func for node in jitted.values() for call in ast.walk(node) if isinstance(call, ast.Call))
    called = {function.id for function in calls if isinstance(function, ast.Name)}
    return set(jitted) - called
