"""What the data of the floors is made of: shapes, formulas, and where a kernel does its work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

_FUNCTIONS = {"ceil": math.ceil, "min": min, "max": max}

Shape = Mapping[str, float]


def value(formula: str, shape: Shape) -> float:
    """A formula of `bench/floors/ops` at a shape: names of the shape, numbers, + - * / // and ceil, min, max.

    Raises:
        NameError: it has a name that the shape does not.
    """
    return float(eval(formula, {"__builtins__": {}}, {**_FUNCTIONS, **shape}))


@dataclass(frozen=True)
class Part:
    """A stretch of a kernel's machine code that is gone through again and again.

    Attributes:
        marker: opcode (a pattern) that tells the stretch: it is the innermost loop with most of them.
        passes: how many warps go through it, all together; `m`: how many markers one of them meets.
        loop: the opcode that tells the loop, where that is another one.
        level: so many loops around that one; None: from the kernel's entry to its end, every loop once.
        most: markers beyond so many are not sought: 1 where a rare path, such as the end of a row, has one of its own.
        without: the marker of an inner loop that is another part.
        exposed: nothing else runs on a multiprocessor meanwhile; it adds to the time of the other parts.
    """

    marker: str
    passes: str
    loop: str = ""
    level: int | None = 0
    most: int = 1 << 20
    without: str = ""
    exposed: bool = False

    def text(self) -> str:
        """What the reading depends on."""
        return f"{self.marker} loop {self.loop!r} level {self.level} most {self.most} without {self.without!r}"


@dataclass(frozen=True)
class Floor:
    """One kernel at one reference shape.

    Attributes:
        kernel: name of the function.
        form: dtype and options in words.
        shape: the names in the formulas and their values.
        read, written: bytes that have to come from and go to memory: what caches can keep counts once.
        operations: floating-point operations (a multiply-add counts as two); products only, where there are any.
        unit: what executes them: "bf16" or "fp8" (tensor cores), "fp32" or "fp64".
        parts: the stretches that take the time; none where a chain of loads does.
        programs: blocks that are launched.
        rounds: loads from memory, or trips to shared counters, of which each waits for the one before; about three that
            a cache answers count as one.
        where: compile-time constants of the specialisation (Triton).
        types: argument -> what its type begins with (Triton); "constexpr": absent.
        symbol: what the mangled name has (CUDA C++).
        threads: of a block (CUDA C++).
        finding: what keeps the kernel from its floor by more than a fifth, and what would help; "" if nothing does.
    """

    kernel: str
    form: str
    shape: Shape
    read: str
    written: str
    operations: str
    unit: str
    programs: str
    rounds: int
    parts: tuple[Part, ...] = ()
    where: Mapping[str, object] = field(default_factory=dict)
    types: Mapping[str, str] = field(default_factory=dict)
    symbol: str = ""
    threads: int = 0
    finding: str = ""

    @property
    def language(self) -> str:
        return "CUDA C++" if self.threads else "Triton"

    def bytes_moved(self, shape: Shape | None = None) -> float:
        """At another shape, too."""
        return value(self.read, shape or self.shape) + value(self.written, shape or self.shape)

    def operations_done(self, shape: Shape | None = None) -> float:
        return value(self.operations, shape or self.shape)

    def selection(self) -> str:
        """What the reading of its machine code depends on, beside the sources."""
        return "; ".join(
            [str(sorted(self.where.items())), str(sorted(self.types.items())), self.symbol]
            + [part.text() for part in self.parts]
        )
