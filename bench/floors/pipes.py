"""Which unit executes an instruction, and for how long in proportion to the others of that unit."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

# Opcode, unit, and clocks of the unit in which others of its kind take one. Unlisted ones take an issue slot alone:
# branches, barriers, and those of the uniform datapath, which works once for a warp.
_UNITS: tuple[tuple[str, str, float], ...] = (
    (r"(FFMA|FMUL|FADD)\b.*", "FMA", 1),
    (r"IMAD\b.*", "FMA", 2),  # on one of the two halves of that unit
    (r"(HFMA2|HADD2|HMUL2|HMNMX2)\b.*", "FMA", 1),
    (r"(MUFU|F2F|F2I|I2F|FRND|POPC|FLO|BREV)\b.*", "XU", 1),
    (r"(DFMA|DMUL|DADD|DSETP)\b.*", "FP64", 1),
    (r"(LDG|STG|LDS|STS|LD|ST)\b.*\b128\b.*", "LSU", 4),
    (r"(LDG|STG|LDS|STS|LD|ST)\b.*\b64\b.*", "LSU", 2),
    (r"(LDG|STG|LDS|STS|LD|ST|LDSM|STSM|SHFL|LDGSTS|RED|ATOMG?|ATOMS|REDUX)\b.*", "LSU", 1),
    (r"(FMNMX|FSETP|FSEL|FSET|FCHK|LOP3|SHF|ISETP|IADD3|VIADD\w*|SEL|PRMT|IMNMX|VIMNMX|PLOP3|LEA|MOV|CS2R|SGXT|BMSK)\b.*",
     "ALU", 1),
    (r"(F2FP|I2FP|IABS|VABSDIFF4?|VHMNMX|LOP|P2R|R2P|IDP|I2IP|F2IP)\b.*", "ALU", 1),
)  # fmt: skip


def unit_of(opcode: str) -> tuple[str, float]:
    """The unit, and its clocks; "" if there is none."""
    for pattern, unit, clocks in _UNITS:
        if re.fullmatch(pattern, opcode):
            return unit, clocks
    return "", 0.0


def work_of(opcodes: Iterable[str]) -> dict[str, float]:
    """Instructions of a warp's path by unit, in clocks of that unit for a warp; "issue": how many there are."""
    work: Counter[str] = Counter()
    for opcode in opcodes:
        work["issue"] += 1
        unit, clocks = unit_of(opcode)
        if unit:
            work[unit] += clocks  # type: ignore[assignment]
    return dict(work)


def product_operations(opcode: str) -> int:
    """Floating-point operations of an instruction of a group of four warps, such as HGMMA.64x256x16; 0 of others."""
    match = re.match(r"[HQ]GMMA\.(\d+)x(\d+)x(\d+)\b", opcode)
    if match is None:
        return 0
    m, n, k = map(int, match.groups())
    return 2 * m * n * k
