"""A fresh virtual environment whose programs see no compiler and nothing of this one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

COMPILERS = ("nvcc", "c++", "g++", "clang++", "cc", "gcc", "clang", "cmake", "ninja", "make")


class Failed(Exception):
    """A command of the environment ended with another status than 0; the message is the end of what it printed."""


class Environment:
    """Of one interpreter, in a folder of its own. Programs run there with PATH naming its programs alone."""

    def __init__(self, folder: Path, python: Path) -> None:
        subprocess.run([str(python), "-m", "venv", str(folder / "venv")], check=True)
        self.programs, self.home = folder / "venv" / "bin", folder / "home"
        self.home.mkdir()
        found = [name for name in COMPILERS if shutil.which(name, path=str(self.programs))]
        if found:
            raise Failed(f"the fresh environment is not free of compilers: {', '.join(found)}")

    def install(self, *requirements: str) -> None:
        """By its own pip, from where the caller's pip is told to look."""
        line = [str(self.programs / "python"), "-m", "pip", "install", "-q", *requirements]
        self._finish(subprocess.run(line, capture_output=True, text=True, check=False))

    def run(self, program: str, *arguments: str) -> str:
        """What a program of the environment prints, run outside the sources and without the caller's variables."""
        names = {"PATH": str(self.programs), "HOME": str(self.home), "TMPDIR": str(self.home), "LC_ALL": "C.UTF-8"}
        kept = {key: value for key, value in os.environ.items() if key.startswith("OMP_")}
        line = [str(self.programs / program), *arguments]
        run = subprocess.run(line, env={**kept, **names}, cwd=self.home, capture_output=True, text=True, check=False)
        return self._finish(run)

    @staticmethod
    def _finish(done: subprocess.CompletedProcess[str]) -> str:
        if done.returncode != 0:
            end = "\n".join((done.stdout + done.stderr).splitlines()[-25:])
            raise Failed(f"status {done.returncode} of {' '.join(map(str, done.args[:4]))} ...\n{end}")
        return done.stdout


@contextmanager
def fresh(python: Path) -> Iterator[Environment]:
    """Made for the block, and removed after it."""
    with tempfile.TemporaryDirectory(prefix="grpo-kernels-") as folder:
        yield Environment(Path(folder), python)


USED = """
import sys
import torch, grpo_kernels
from grpo_kernels import _extension
problem = _extension.cpu_problem()
libraries = {line.split()[-1] for line in open("/proc/self/maps") if "gomp" in line or "iomp" in line}
print(torch.__version__, "pure" if problem else "native", len(libraries), all("torch" in path for path in libraries))
"""
"""Prints torch's version, whether the extension loads, the number of OpenMP run times, and whether all are torch's."""


def verify(environment: Environment, native: bool, options: list[str]) -> tuple[str, str, str]:
    """torch's version, the last line of `grpo-kernels verify`, and what `grpo-kernels env` prints.

    Raises:
        Failed: an op is wrong, the extension does not load where there is one, or there is more than torch's OpenMP.
    """
    torch_version, kind, libraries, shared = environment.run("python", "-c", USED).split()
    if native != (kind == "native"):
        raise Failed(
            f"the extension {'does not load' if native else 'is there'}: {environment.run('grpo-kernels', 'env')}"
        )
    if native and (libraries, shared) != ("1", "True"):
        raise Failed(f"{libraries} OpenMP run times in the process, all of torch: {shared}")
    report = environment.run("grpo-kernels", "env")
    summary = environment.run("grpo-kernels", "verify", *options).splitlines()[-1]
    if not re.match(r"verified: \d+ ops?\b", summary):
        raise Failed(f"verify ended with {summary!r}")
    return torch_version, summary, report
