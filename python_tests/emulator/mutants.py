"""Mistakes planted in the real kernels: one source is changed, compiled and linked with everything else as it is."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from python_tests.emulator import build

BARRIER = "__syncthreads();"


@dataclass(frozen=True)
class Mutant:
    """`old`, where it stands for the `occurrence`-th time in `source` (below csrc), becomes `new`."""

    source: str
    old: str
    new: str
    occurrence: int = 0

    def __str__(self) -> str:
        kernel = re.search(r"\w+_kernel", self.old)
        name = kernel[0] if kernel else re.sub(r"\W+", "_", self.old).strip("_")[:40]
        return f"{self.source.partition('/')[0]}-{name}-{self.occurrence}"

    @property
    def unit(self) -> str:
        """The source that is compiled: for a header the kernels beside it."""
        return self.source if self.source.endswith(".cu") else f"{self.source.rpartition('/')[0]}/cuda.cu"

    def text(self) -> str:
        """The changed source. Raises ValueError where `old` is not there: the table of mutants is out of date."""
        parts = (build.ROOT / "csrc" / self.source).read_text().split(self.old)
        if len(parts) < self.occurrence + 2:
            raise ValueError(f"csrc/{self.source} has no {self.old!r} number {self.occurrence}")
        head = self.old.join(parts[: self.occurrence + 1])
        return head + self.new + self.old.join(parts[self.occurrence + 1 :])


def without_each_barrier(source: str) -> list[Mutant]:
    """One mutant for every barrier of a kernel source."""
    count = (build.ROOT / "csrc" / source).read_text().count(BARRIER)
    return [Mutant(source, BARRIER, "", occurrence) for occurrence in range(count)]


def with_a_trap_in_each_kernel(source: str) -> list[Mutant]:
    """One mutant for every kernel of a source: it notices whether the kernel runs at all."""
    text = (build.ROOT / "csrc" / source).read_text()
    return [
        Mutant(source, match[0], f"{match[0]} __trap();")
        for match in re.finditer(r"__global__ [^;{]*?\w+\([^;{]*?\) \{", text)
    ]


def compile_mutant(mutant: Mutant, folder: Path, sanitize: bool = False) -> Path:
    """The module with the mistake in it, in `folder`."""
    finished = build.built(sanitize)
    source, changed = build.ROOT / "csrc" / mutant.source, folder / mutant.source
    changed.parent.mkdir(parents=True, exist_ok=True)
    changed.write_text(mutant.text())
    linked = build.output("ninja", "-C", str(finished), "-t", "commands", "_C.so").splitlines()
    compiled = next(line for line in linked if shlex.split(line)[-1:] == [str(build.ROOT / "csrc" / mutant.unit)])
    original = _after(compiled, "-o")
    replacements = {original: f"{changed}.o", f"{original}.d": f"{changed}.d", str(source): str(changed)}
    replacements["_C.so"] = str(folder / "_C.so")
    compiler, *arguments = shlex.split(compiled)
    for words in (
        [compiler, f"-I{folder}", *arguments],  # a changed header before the one that it stands for
        shlex.split(linked[-1].removeprefix(": && ").removesuffix(" && :")),
    ):
        build.output(*(replacements.get(word, word) for word in words), cwd=finished)
    return folder / "_C.so"


def _after(command: str, option: str) -> str:
    words = shlex.split(command)
    return words[words.index(option) + 1]
