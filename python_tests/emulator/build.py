"""Builds the emulated kernels under build/emulator, and loads them.

GK_EMULATOR_SANITIZE=1 takes the build with address sanitizer; the process then needs `sanitizer_settings()`.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import ModuleType

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SANITIZE = os.environ.get("GK_EMULATOR_SANITIZE") == "1"
FOLDERS = {
    sanitize: ROOT / "build" / "emulator" / f"{sys.implementation.cache_tag}-{name}"
    for sanitize, name in ((False, "plain"), (True, "asan"))
}
COMPILER = os.environ.get("CXX", "g++")


def problem() -> str:
    """Why the emulator cannot be built here, or ""."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "the emulator needs Linux on x86-64"
    missing = [tool for tool in (COMPILER, "cmake", "ninja") if _tool(tool) is None]
    if importlib.util.find_spec("pybind11") is None:
        missing.append("pybind11")
    return f"the emulator needs {', '.join(missing)}" if missing else ""


def _tool(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)]))


def output(command: str, *arguments: str, cwd: Path = ROOT) -> str:
    """What a command prints. Raises RuntimeError with all of it when it fails."""
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    words = [_tool(command) or command, *arguments]
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(words)}\n{done.stdout[-6000:]}{done.stderr[-6000:]}")
    return done.stdout


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Other test processes wait."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@functools.cache
def built(sanitize: bool = SANITIZE) -> Path:
    """The folder of the finished build; what is up to date is not built again."""
    import pybind11

    folder = FOLDERS[sanitize]
    includes = f"{sysconfig.get_paths()['include']};{pybind11.get_include()}"
    with _alone(folder):
        output(
            *("cmake", "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}", "-S", str(HERE)),
            *("-B", str(folder), f"-DCMAKE_CXX_COMPILER={_tool(COMPILER)}", f"-DGK_INCLUDES={includes}"),
            f"-DGK_SANITIZE={'ON' if sanitize else 'OFF'}",
        )
        output("ninja", "-C", str(folder))
    return folder


def load(path: Path) -> ModuleType:
    """The module `_C` in a file. Its name tells files apart: Python keeps one module a name."""
    loader = ExtensionFileLoader(re.sub(r"\W", "_", str(path.parent)) + "._C", str(path))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    module.set_tensor_type(torch.Tensor, False)
    return module


@functools.cache
def module() -> ModuleType:
    """Our kernels."""
    return load(built() / "_C.so")


@functools.cache
def test_kernels() -> ctypes.CDLL:
    """The kernels under kernels/."""
    return ctypes.CDLL(str(built() / "test_kernels.so"))


def commands() -> dict[str, str]:
    """Source (relative to the checkout) -> command that compiles it."""
    entries = json.loads((built() / "compile_commands.json").read_text())
    return {os.path.relpath(entry["file"], ROOT): entry["command"] for entry in entries}


def sanitizer_settings() -> dict[str, str]:
    """What the environment of a Python process needs before it loads the sanitized build: the sanitizer comes first."""
    libraries = [output(COMPILER, f"-print-file-name={name}").strip() for name in ("libasan.so", "libubsan.so")]
    return {
        "LD_PRELOAD": ":".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
        "GK_EMULATOR_SANITIZE": "1",
    }


def sanitizer_environment() -> dict[str, str]:
    """This process' environment with those settings."""
    return {**os.environ, **sanitizer_settings()}


if __name__ == "__main__":  # env $(python -m python_tests.emulator.build) python -m pytest ...
    built(True)
    print(*(f"{name}={value}" for name, value in sanitizer_settings().items()))
