"""What a kernel may cost and must contain, and the verdict on what a compiler made of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

ARCHITECTURES = (80, 90, 100)

# Per multiprocessor of each architecture: shared memory, warps and blocks.
_SHARED = {80: 164 * 1024, 89: 100 * 1024, 90: 228 * 1024, 100: 228 * 1024}
_WARPS, _BLOCKS = {80: 64, 89: 48, 90: 64, 100: 64}, {80: 32, 89: 24, 90: 32, 100: 32}
_RESERVED = 1024  # bytes that the system takes from every block
_REGISTERS, _WARP = 65536, 32


def largest_block(architecture: int) -> int:
    """Bytes of shared memory that one block may have."""
    return _SHARED[architecture] - _RESERVED


@dataclass(frozen=True)
class Instructions:
    """How many machine instructions a kernel has whose whole name matches `pattern`."""

    label: str
    pattern: str
    at_least: int = 0
    at_most: int | None = None

    def count(self, opcodes: Mapping[str, int]) -> int:
        return sum(number for opcode, number in opcodes.items() if re.fullmatch(self.pattern, opcode))


WIDE_LOADS = Instructions("LDG.128", r"LDG\..*\b(128|256)\b.*", at_least=1)
WIDE_STORES = Instructions("STG.128", r"STG\..*\b(128|256)\b.*", at_least=1)
NO_BARRIER = Instructions("BAR", r"BAR\..*|B2R\..*", at_most=0)
# The order of such sums is not fixed; no kernel of the package may have one.
NO_FLOAT_ATOMICS = Instructions("float atomics", r"(RED|ATOM)\w*\..*F(16|32|64).*", at_most=0)


@dataclass(frozen=True)
class Gate:
    """Limits of one kernel. No kernel may spill, use the stack, or add floats with atomics.

    Attributes:
        kernel: name of the function.
        registers: most registers a thread may have; by architecture, where they differ.
        threads: of a block; for CUDA C++, whose launchers choose it at run time, the largest.
        shared: most bytes of shared memory, static and dynamic.
        instructions: what must, or must not, be in the machine code.
        variant: which specialisations of the kernel are meant, where a kernel has several gates.
    """

    kernel: str
    registers: int | Mapping[int, int]
    threads: int
    shared: int = 0
    instructions: tuple[Instructions, ...] = ()
    variant: str = ""

    def register_limit(self, architecture: int) -> int:
        return self.registers if isinstance(self.registers, int) else self.registers[architecture]


@dataclass(frozen=True)
class Measured:
    """One kernel in machine code. `spills` are bytes that its instructions move to and from local memory."""

    registers: int
    spills: int
    stack: int
    shared: int
    opcodes: Mapping[str, int]


def violations(gate: Gate, measured: Measured, architecture: int) -> list[str]:
    """What the gate forbids, in words; empty if the kernel passes."""
    limits = (
        ("registers", measured.registers, gate.register_limit(architecture)),
        ("bytes of spills", measured.spills, 0),
        ("bytes of stack", measured.stack, 0),
        ("bytes of shared memory", measured.shared, min(gate.shared, largest_block(architecture))),
    )
    found = [f"{value} {name}, at most {limit} allowed" for name, value, limit in limits if value > limit]
    for rule in (NO_FLOAT_ATOMICS, *gate.instructions):
        count = rule.count(measured.opcodes)
        if count < rule.at_least:
            found.append(f"{count} instructions {rule.label}, at least {rule.at_least} wanted")
        if rule.at_most is not None and count > rule.at_most:
            found.append(f"{count} instructions {rule.label}, at most {rule.at_most} allowed")
    return found


def resident_warps(registers: int, shared: int, threads: int, architecture: int) -> int:
    """Warps that a multiprocessor of 64 (sm_89: 48) holds, as far as registers, shared memory and its blocks decide."""
    warps = -(-threads // _WARP)
    registers_of_warp = -(-registers // 8) * 8 * _WARP
    by_registers = _REGISTERS // 4 // registers_of_warp * 4 // warps  # each quarter has its own register file
    by_shared = _SHARED[architecture] // (shared + _RESERVED)
    return min(by_registers, by_shared, _WARPS[architecture] // warps, _BLOCKS[architecture]) * warps
