"""The CUDA C++ kernels, compiled by nvcc with the flags of the build."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from pathlib import Path

from bench.gates import binary
from bench.gates.gate import Measured

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc"
# cmake/cuda.cmake's; a test compares them with the build tree.
FLAGS = ("-O3", "-DNDEBUG", "-std=c++17", "-Xcompiler=-fPIC", "-Xcompiler=-fvisibility=hidden", "-DGK_ISA=isa_cuda")


def problem() -> str:
    """Why CUDA C++ kernels cannot be compiled here; empty if they can."""
    return binary.problem("nvcc")


@functools.cache
def compiler() -> str:
    """The compiler and its version, such as "nvcc 13.0"."""
    text = subprocess.run([binary.tool("nvcc"), "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+\.\d+)", text)
    if match is None:
        raise RuntimeError(f"nvcc --version says no release: {text!r}")
    return f"nvcc {match.group(1)}"


def sources() -> list[Path]:
    return sorted(SOURCES.rglob("*.cu"))


def op_of(source: Path) -> str:
    return source.parent.name


def architecture_names(source: Path) -> dict[int, str]:
    """Architecture -> the name that the build compiles this source for: 90a alone for what needs wgmma."""
    lists = (ROOT / "CMakeLists.txt").read_text()
    name = source.relative_to(ROOT).as_posix()
    for variable, architecture in (("SM90A_SOURCES", 90), ("SM100A_SOURCES", 100)):
        listed = re.search(rf"set\({variable}\b([^)]*)\)", lists)
        if listed and name in listed.group(1).split():
            return {architecture: f"{architecture}a"}
    return {80: "80", 90: "90", 100: "100"}


def declared_kernels(text: str) -> set[str]:
    """Names of the __global__ functions of a source."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    starts = re.split(r"\b__global__\b", text)[1:]
    names = set()
    for start in starts:
        start = re.sub(r"__launch_bounds__\s*\((?:[^()]|\([^()]*\))*\)", "", start)
        match = re.match(r"[^({;]*?(\w+)\s*\(", start)
        if match is None:
            raise ValueError(f"cannot read the kernel declared as {start[:80]!r}")
        names.add(match.group(1))
    return names


def compile_source(source: Path, architecture: str, extra: tuple[str, ...] = ()) -> dict[str, Measured]:
    """Name of each kernel -> what nvcc made of it for an architecture such as "80" or "90a"."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        target = f"--generate-code=arch=compute_{architecture},code=sm_{architecture}"
        command = [binary.tool("nvcc"), "-cubin", *FLAGS, target, f"-I{SOURCES}", "-Xptxas", "-v", *extra]
        result = subprocess.run([*command, str(source), "-o", str(cubin)], capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{source.name} does not compile for sm_{architecture}:\n{result.stderr}")
        found = binary.contents(cubin.read_bytes())
    reports = _reports(result.stderr)
    measured: dict[str, Measured] = {}
    for symbol, (registers, stack, opcodes) in found.items():
        spills, shared = reports[symbol]
        name = binary.function_name(symbol)
        if name in measured:  # instances of one template
            name = f"{name} {symbol}"
        measured[name] = Measured(registers, max(spills, binary.local_bytes(opcodes)), stack, shared, opcodes)
    return measured


def _reports(log: str) -> dict[str, tuple[int, int]]:
    """Symbol -> bytes of spills and of static shared memory, as ptxas reports them."""
    reports = {}
    for symbol, text in re.findall(r"Compiling entry function '(\S+)'(.*?)(?=Compiling entry|\Z)", log, re.DOTALL):
        spills = sum(int(number) for number in re.findall(r"(\d+) bytes spill", text))
        shared = re.search(r"(\d+) bytes smem", text)
        reports[symbol] = (spills, int(shared.group(1)) if shared else 0)
    return reports
