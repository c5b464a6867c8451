"""What the machine code of a kernel says: compiled as it ships, for the H100."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.floors import pipes, sass
from bench.floors.floor import Floor, Part
from bench.floors.machine import ARCHITECTURE
from bench.gates import binary, cuda_kernels, fingerprint, sweep, triton_kernels
from bench.gates.gate import resident_warps

Row = dict[str, Any]

_NAMES = {"LDG": "load", "STG": "store"}


def width_of(opcode: str) -> tuple[str, int] | None:
    """("load" or "store", bytes of a thread) of an instruction for global memory."""
    base, *suffixes = opcode.split(".")
    if base not in _NAMES:
        return None
    sizes = [int(digits) for suffix in suffixes if (digits := suffix.lstrip("US")) in ("8", "16", "64", "128", "256")]
    return _NAMES[base], (sizes[0] if sizes else 32) // 8


def widths(path: Sequence[sass.Instruction]) -> dict[str, list[int]]:
    """Narrowest and widest load and store of global memory, bytes a thread."""
    found: dict[str, list[int]] = {}
    for instruction in path:
        if width := width_of(instruction.opcode):
            found.setdefault(width[0], []).append(width[1])
    return {name: [min(sizes), max(sizes)] for name, sizes in found.items()}


def _registers(text: str) -> set[int]:
    return {int(number) for number in re.findall(r"\bR(\d+)\b", text)}


def bytes_in_flight(path: Sequence[sass.Instruction], again: bool) -> int:
    """Most bytes that a thread has asked global memory for and not used yet, on a path, or round a loop (`again`)."""
    waiting: dict[int, int] = {}  # first register of a load -> its bytes
    most = 0
    for instruction in [*path, *path] if again else path:
        width = width_of(instruction.opcode)
        written, _, rest = instruction.operands.partition(",")
        used = _registers(instruction.operands if width and width[0] == "store" else rest)
        loaded = min(_registers(written), default=None) if width and width[0] == "load" else None
        for first, size in list(waiting.items()):
            if first == loaded or any(first <= register < first + max(1, size // 4) for register in used):
                del waiting[first]
        if width and loaded is not None:
            waiting[loaded] = width[1]
            most = max(most, sum(waiting.values()))
    return most


def read_part(part: Part, blocks: list[sass.Block]) -> Row:
    """The counts of one stretch."""
    loop = None if part.level is None else sass.main_loop(blocks, part.loop or part.marker, part.level, part.most)
    without: frozenset[int] = frozenset()
    if part.without:
        inner = sass.main_loop(blocks, part.without)
        without = inner.blocks
    path, markers = sass.path(blocks, part.marker, loop, without, part.most)
    if not markers:
        raise ValueError(f"no way through has an instruction {part.marker}")
    return {
        "work": pipes.work_of(instruction.opcode for instruction in path),
        "markers": len(markers),
        "widths": widths(path),
        "in_flight": bytes_in_flight(path, loop is not None),
        "products": sum(pipes.product_operations(instruction.opcode) for instruction in path),
    }


def _row(op: str, floor: Floor, code: str, registers: int, stack: int, shared: int, threads: int, compiler: str) -> Row:
    blocks = sass.blocks_of(code)
    opcodes = binary.opcodes_of(code)
    everything = [instruction for block in blocks for instruction in block.instructions]
    try:
        parts = [read_part(part, blocks) for part in floor.parts]
    except ValueError as error:
        raise ValueError(f"{op}: {floor.kernel}, {floor.form}: {error}") from error
    return {
        "op": op,
        "kernel": floor.kernel,
        "form": floor.form,
        "compiler": compiler,
        "sources": fingerprint.of(op, compiler),
        "selection": floor.selection(),
        "registers": registers,
        "spills": binary.local_bytes(opcodes) + stack,
        "shared": shared,
        "threads": threads,
        "warps": resident_warps(registers, shared, threads, ARCHITECTURE),
        "instructions": len(everything),
        "widths": widths(everything),
        "tma": any(opcode.startswith("UTMA") for opcode in opcodes),
        "parts": parts,
    }


def _code_of(cubin: bytes, of_triton: bool) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.cubin"
        path.write_bytes(cubin)
        return binary.sections(binary.output([binary.tool("nvdisasm", of_triton), "-c", str(path)]))


def _fits(floor: Floor, of: triton_kernels.Specialisation) -> bool:
    types = {name: kind for name, kind, _ in of.arguments}
    return (
        of.kernel == floor.kernel
        and all(of.constant(name) == value for name, value in floor.where.items())
        and all(types[name].startswith(kind) for name, kind in floor.types.items())
    )


def read_triton(op: str, floor: Floor) -> Row:
    """The first specialisation that the gates launch and the floor means."""
    launches = sweep.launches_for(op, False, ARCHITECTURE)
    launch = next((launch for launch in launches if _fits(floor, launch.specialisation)), None)
    if launch is None:
        raise ValueError(f"{op}: no gate launches {floor.kernel} as {floor.form}: {floor.selection()}")
    compiled = triton_kernels.compiled(launch, ARCHITECTURE)
    cubin = compiled.asm["cubin"]
    ((registers, stack, _),) = binary.contents(cubin, of_triton=True).values()
    (code,) = _code_of(cubin, True).values()
    warps = launch.specialisation.warps * (3 if floor.where.get("SPECIALIZED") else 1)  # one group loads, two multiply
    return _row(op, floor, code, registers, stack, compiled.metadata.shared, 32 * warps, triton_kernels.compiler())


def read_cuda(op: str, floors: Sequence[Floor]) -> list[Row]:
    """Those of an op's CUDA C++ sources."""
    rows = []
    for source in cuda_kernels.sources():
        if cuda_kernels.op_of(source) != op:
            continue
        name = cuda_kernels.architecture_names(source)[ARCHITECTURE]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernels.cubin"
            target = f"--generate-code=arch=compute_{name},code=sm_{name}"
            command = [binary.tool("nvcc"), "-cubin", *cuda_kernels.FLAGS, target, f"-I{cuda_kernels.SOURCES}"]
            subprocess.run([*command, str(source), "-o", str(path)], check=True, capture_output=True)
            contents, codes = binary.contents(path.read_bytes()), _code_of(path.read_bytes(), False)
            usage = binary.output([binary.tool("cuobjdump"), "--dump-resource-usage", str(path)])
        for floor in floors:
            symbols = [s for s in codes if binary.function_name(s) == floor.kernel and floor.symbol in s]
            if len(symbols) != 1:
                raise ValueError(f"{op}: {floor.kernel} {floor.symbol!r} is {symbols or 'nowhere'}")
            registers, stack, _ = contents[symbols[0]]
            shared = int(re.findall(rf"Function {re.escape(symbols[0])}:.*?SHARED:(\d+)", usage, re.DOTALL)[0])
            rows.append(
                _row(op, floor, codes[symbols[0]], registers, stack, shared, floor.threads, cuda_kernels.compiler())
            )
    return rows
