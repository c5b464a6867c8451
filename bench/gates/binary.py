"""What is in a cubin: registers, stack, local memory and machine instructions of each kernel."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

_OPCODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
_LOCAL = re.compile(r"(?:LDL|STL)\b.*?(?:\.(?:U|S)?(8|16|64|128))?")


class MissingTool(RuntimeError):
    """A compiler or disassembler that is not installed; the message names it."""


@functools.cache
def tool(name: str, of_triton: bool = False) -> str:
    """Path of `nvdisasm`, `cuobjdump` or `nvcc`.

    The CUDA toolkit and Triton's wheel both have the first two. A disassembler may not know what a newer compiler
    wrote, so each compiler's own comes first.
    """
    folders = [
        os.environ.get("PATH", ""),
        *(f"{root}/bin" for root in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if root),
    ]
    spec = importlib.util.find_spec("triton")
    wheel = [str(Path(spec.origin).parent / "backends" / "nvidia" / "bin")] if spec is not None and spec.origin else []
    path = os.pathsep.join([*wheel, *folders] if of_triton else [*folders, *wheel])
    found = shutil.which(name, path=path)
    if found is None:
        raise MissingTool(f"{name} was found neither on PATH nor in a CUDA toolkit nor in Triton")
    return found


def problem(*others: str) -> str:
    """Which of the disassemblers, and of these other tools, is not there; empty if all are."""
    try:
        for name in ("nvdisasm", "cuobjdump", *others):
            tool(name)
    except MissingTool as error:
        return str(error)
    return ""


def output(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {result.stderr.strip() or result.stdout.strip()}")
    return result.stdout


def sections(code: str) -> dict[str, str]:
    """Symbol of each kernel -> its disassembly."""
    parts = re.split(r"^\.text\.(\S+):$", code, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def opcodes_of(disassembly: str) -> dict[str, int]:
    """Full names of the instructions, such as "LDG.E.128", and how often they stand there."""
    return dict(Counter(_OPCODE.findall(disassembly)))


def local_bytes(opcodes: Mapping[str, int]) -> int:
    """Bytes that the instructions move to and from local memory: spills, and arrays that are not in registers."""
    total = 0
    for opcode, count in opcodes.items():
        if match := _LOCAL.fullmatch(opcode):
            total += count * int(match.group(1) or 32) // 8
    return total


def contents(cubin: bytes, of_triton: bool = False) -> dict[str, tuple[int, int, dict[str, int]]]:
    """Symbol of each kernel -> registers, bytes of stack, instructions."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.cubin"
        path.write_bytes(cubin)
        usage = output([tool("cuobjdump", of_triton), "--dump-resource-usage", str(path)])
        code = sections(output([tool("nvdisasm", of_triton), "-c", str(path)]))
    found = {}
    for symbol, registers, stack in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage):
        found[symbol] = (int(registers), int(stack), opcodes_of(code[symbol]))
    if found.keys() != code.keys():
        raise RuntimeError(f"cuobjdump lists {sorted(found)}, nvdisasm {sorted(code)}")
    return found


def function_name(symbol: str) -> str:
    """The kernel's own name from a mangled one; the scopes around it and the types behind it are dropped."""
    match = re.match(r"_ZN?", symbol)
    if match is None:
        return symbol
    name, position = "", match.end()
    while number := re.match(r"(\d+)", symbol[position:]):
        begin = position + number.end()
        position = begin + int(number.group(1))
        name = symbol[begin:position]
    return name or symbol
