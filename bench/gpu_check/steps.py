"""The phases that are more than one command: `python -m bench.gpu_check.steps NAME ...`. Nothing here needs torch,
except `versions`, which finds out whether it is there.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.gpu_check.phases import SKIPPED
from bench.gpu_check.settings import ROOT

_REPORTED = 7  # exit status of the sanitizer where it has something to report
_REPORT = re.compile(r"\bat (?:void )?([\w:]+)[^+\n]*\+0x")

_NEEDED = ("pytest", "hypothesis", "pybind11", "cmake", "ninja")
_OPTIONAL = ("pytest_timeout", "pytest_benchmark", "rich", "matplotlib")
_SHOWN = ("torch", "triton", "numpy", *_NEEDED, *_OPTIONAL)


def _call(*command: str | Path, **options: Any) -> int:
    print("+", *command, flush=True)
    try:
        status = subprocess.run([str(part) for part in command], check=False, **options).returncode
    except (OSError, subprocess.SubprocessError) as error:
        print(f"{command[0]}: {error}")
        return 127
    if status < 0:
        print(f"{command[0]} died: {signal.Signals(-status).name}")
    return status


def versions(target: str, device: str) -> int:
    """Prints what is installed; writes what later phases need to know of the machine and the package."""
    print("Python", sys.version.split()[0], sys.executable, platform.platform())
    for name in _SHOWN:
        try:
            print(" ", name, importlib.metadata.version(name.replace("_", "-")))
        except importlib.metadata.PackageNotFoundError:
            print(" ", name, "is not installed")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    print(f"{header} {'exists' if header.exists() else 'is missing: nothing can be built for this Python'}")
    for tool in ("nvcc", "c++", "cmake"):
        _call(tool, "--version")
    if device == "cuda":
        fields = "name,driver_version,memory.total,memory.used,clocks.sm,clocks.mem,temperature.gpu,compute_mode"
        _call("nvidia-smi", f"--query-gpu={fields}", "--format=csv", timeout=20)
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        print(f"device: none, torch {torch.__version__} for CUDA {torch.version.cuda} sees no CUDA device")
        return 1
    from bench import machine
    from grpo_kernels import _dispatch

    description = machine.describe(device)
    found = {
        "slug": machine.slug(device),
        "machine": description,
        "capability": "",
        "public": sorted(_dispatch.public_ops()),
        "packages": sorted({package.rpartition(".")[2] for package in _dispatch.registered_ops().values()}),
    }
    if device == "cuda":
        found["capability"] = "".join(map(str, torch.cuda.get_device_capability()))
        print(f"free GPU memory: {torch.cuda.mem_get_info()[0] >> 20} MiB")
    Path(target).write_text(json.dumps(found))
    print(f"device: {description['device']}, torch {torch.__version__}, Python {platform.python_version()}")
    return 0


def _missing(names: tuple[str, ...]) -> list[str]:
    tools = {"cmake", "ninja"}  # a program on PATH will do
    return [n for n in names if importlib.util.find_spec(n) is None and not (n in tools and shutil.which(n))]


def packages(work: str) -> int:
    """Says what is missing, and installs it from GK_WHEELS into a folder of its own."""
    absent = _missing(_NEEDED + _OPTIONAL)
    wheels = os.environ.get("GK_WHEELS")
    if absent and wheels:
        names = [name.replace("_", "-") for name in absent]
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--find-links", wheels]
        if _call(*pip, "--target", Path(work) / "site", *names):
            return 1
        importlib.invalidate_caches()
        if (site := str(Path(work) / "site")) not in sys.path:
            sys.path.append(site)
        absent = _missing(_NEEDED + _OPTIONAL)
    needed = [name for name in absent if name in _NEEDED]
    if needed:
        print("GK_WHEELS=FOLDER installs them from wheels (pip download -d FOLDER --only-binary=:all: NAME...)")
        print(f"missing: {' '.join(needed)}")
        return 1
    print(f"without {', '.join(absent)}, which nothing here depends on" if absent else "all that is needed is there")
    return 0


def _module_folder(work: Path, rehearse: bool) -> Path:
    """Where the module goes. A rehearsal leaves alone the one that a development machine has for all architectures."""
    package = ROOT / "grpo_kernels"
    present = (package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").exists()
    return work / "module" if rehearse and present else package


def build(work: str, capability: str, rehearse: str = "") -> int:
    """CMake and ninja, for the present architecture alone."""
    nvcc = shutil.which("nvcc")
    if not nvcc:
        print("nvcc was not found: without CUDA kernels" if rehearse else "nvcc was not found")
    import pybind11

    folder = Path(work) / f"cmake-{sys.implementation.cache_tag}"
    cache = folder / "CMakeCache.txt"
    if cache.exists() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cache.read_text():
        shutil.rmtree(folder)  # of a tree that lay elsewhere
    target = _module_folder(Path(work), bool(rehearse))
    os.environ["CUDAARCHS"] = f"{capability or 80}-real"
    os.environ.pop("CMAKE_CUDA_ARCHITECTURES", None)  # it would take precedence
    status = _call(
        *("cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"),
        f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DGRPO_KERNELS_OUTPUT_DIR={target}",
        f"-DGRPO_KERNELS_CUDA={1 if nvcc or not rehearse else 0}",
    ) or _call("cmake", "--build", folder)
    if status:
        return status
    module = target / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    if _call(sys.executable, "-m", "grpo_kernels.cli", "env"):
        return 1
    cuda = f"CUDA for sm_{capability or 80}" if nvcc else "no CUDA"
    print(f"built {module.relative_to(ROOT)}, {module.stat().st_size >> 10} KiB, {cuda}")
    return 0


def _own_kernels() -> set[str]:
    """Names of the package's kernels, from its sources."""
    folders = (
        ("grpo_kernels", "*_triton.py", r"^def (\w+_kernel)\("),
        ("csrc", "*.cu", r"__global__(?:\s|void|__launch_bounds__\([^)]*\))*\b(\w+)\("),
    )
    return {
        name
        for folder, files, pattern in folders
        for path in (ROOT / folder).rglob(files)
        for name in re.findall(pattern, path.read_text(), re.MULTILINE)
    }


def _watched(command: list[str]) -> tuple[int, set[str]]:
    """Exit status, and the kernels that the sanitizer's reports name; the output is passed on as it comes."""
    print("+", *command, flush=True)
    kernels = set()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as run:
        for line in run.stdout or ():
            print(line, end="", flush=True)
            if line.startswith("========="):
                kernels |= {found.rpartition("::")[2] for found in _REPORT.findall(line)}
    return run.returncode, kernels


def sanitizer(tool: str, device: str) -> int:
    """compute-sanitizer over every sample, each allocation its own. What it reports of other libraries alone (cuBLAS,
    PyTorch's copies) is named and does not count."""
    program = shutil.which("compute-sanitizer")
    if not program:
        print("compute-sanitizer was not found on PATH")
        return SKIPPED
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    options = ["--tool", tool, "--report-api-errors", "no", "--error-exitcode", str(_REPORTED), "--print-limit", "20"]
    status, kernels = _watched([program, *options, sys.executable, "-m", "python_tests.gpu.small", "--device", device])
    if not kernels:
        return status
    ours = sorted(kernels & _own_kernels())
    others = sorted(kernels - _own_kernels())
    print(f"reported in kernels of ours: {' '.join(ours) or 'none'}; of other libraries: {' '.join(others) or 'none'}")
    return status if ours or status != _REPORTED else 0


def main() -> int:
    steps: dict[str, Callable[..., int]] = {
        "versions": versions,
        "packages": packages,
        "build": build,
        "sanitizer": sanitizer,
    }
    return steps[sys.argv[1]](*sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
