"""A kernel's disassembly as blocks and loops, and the path through them that its work takes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_LABEL = re.compile(r"^(\.L\w+):")
_TARGET = re.compile(r"\.L\w+")


@dataclass(frozen=True)
class Instruction:
    predicate: str
    opcode: str
    operands: str

    @property
    def leaves(self) -> bool:
        """Whether nothing follows it."""
        base = self.opcode.split(".")[0]
        condition = self.predicate or re.search(r"\bU?P\d", self.operands)
        return base in ("EXIT", "RET", "BRA", "BRX") and not condition


@dataclass
class Block:
    instructions: list[Instruction] = field(default_factory=list)
    next: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Loop:
    header: int
    blocks: frozenset[int]


def blocks_of(disassembly: str) -> list[Block]:
    """The blocks of a kernel in the order of memory; the first one is its entry."""
    blocks, labels = [Block()], {}
    for line in disassembly.splitlines():
        if match := _LABEL.match(line.strip()):
            if blocks[-1].instructions:
                blocks.append(Block())
            labels[match.group(1)] = len(blocks) - 1
        elif match := _LINE.search(line):
            blocks[-1].instructions.append(Instruction(match.group(1) or "", match.group(2), match.group(3)))
            if match.group(2).split(".")[0] in ("BRA", "BRX", "EXIT", "RET"):
                blocks.append(Block())
    for index, block in enumerate(blocks):
        last = block.instructions[-1] if block.instructions else None
        if last is None or not last.leaves:
            block.next += [index + 1] if index + 1 < len(blocks) else []
        if last is not None and last.opcode.startswith("BR"):  # one target, or a table of them
            block.next += [labels[target] for target in _TARGET.findall(last.operands)]
    return blocks


def _back_edges(blocks: list[Block]) -> list[tuple[int, int]]:
    """Edges to a block that is still being walked from: those that close loops."""
    found: list[tuple[int, int]] = []
    state = [0] * len(blocks)
    stack: list[tuple[int, Iterator[int]]] = [(0, iter(blocks[0].next))]
    state[0] = 1
    while stack:
        at, rest = stack[-1]
        following = next(rest, None)
        if following is None:
            state[at] = 2
            stack.pop()
        elif state[following] == 1:
            found.append((at, following))
        elif state[following] == 0:
            state[following] = 1
            stack.append((following, iter(blocks[following].next)))
    return found


def loops_of(blocks: list[Block]) -> list[Loop]:
    """The natural loops; those that begin at the same block are one."""
    before: dict[int, set[int]] = {}
    for index, block in enumerate(blocks):
        for following in block.next:
            before.setdefault(following, set()).add(index)
    members: dict[int, set[int]] = {}
    for latch, header in _back_edges(blocks):
        inside = members.setdefault(header, {header})
        waiting = [latch]
        while waiting:
            at = waiting.pop()
            if at not in inside:
                inside.add(at)
                waiting += before.get(at, ())
    return [Loop(header, frozenset(inside)) for header, inside in members.items() if len(inside) > 1 or header in
            blocks[header].next]  # fmt: skip


def count(block: Block, marker: str) -> int:
    """Instructions of a block whose whole opcode matches."""
    return sum(re.fullmatch(marker, instruction.opcode) is not None for instruction in block.instructions)


def main_loop(blocks: list[Block], marker: str, level: int = 0, most: int = 1 << 20) -> Loop:
    """The innermost loop that has the marker, the one with most of them; `level`: the loop so many levels around it.

    Raises:
        ValueError: there is none.
    """
    found = [loop for loop in loops_of(blocks) if any(count(blocks[i], marker) for i in loop.blocks)]
    inner = [loop for loop in found if not any(other.blocks < loop.blocks for other in found)]
    if not inner:
        raise ValueError(f"no loop has an instruction {marker}")
    best = max(inner, key=lambda loop: (len(path(blocks, marker, loop, most=most)[1]), -loop.header))
    around = sorted((loop for loop in found if best.blocks < loop.blocks), key=lambda loop: len(loop.blocks))
    if level > len(around):
        raise ValueError(f"the loop of {marker} has {len(around)} loops around it, not {level}")
    return around[level - 1] if level else best


def path(
    blocks: list[Block],
    marker: str,
    loop: Loop | None = None,
    without: frozenset[int] = frozenset(),
    most: int = 1 << 20,
) -> tuple[list[Instruction], list[Instruction]]:
    """The way through a loop, or from the kernel's entry to its end, that meets the most markers (none above `most`
    counts) and, of those, the fewest instructions: all its instructions, and the markers. Loops on the way are gone
    through once. Blocks in `without` count as empty.

    Predicated instructions count: a warp issues them.
    """
    closing = set(_back_edges(blocks))
    start = loop.header if loop else 0
    inside = loop.blocks if loop else frozenset(range(len(blocks)))
    ends = {at for at, header in closing if loop and header == loop.header}
    behind = {}
    for other in loops_of(blocks):
        behind[other.header] = {n for i in other.blocks for n in blocks[i].next if n not in other.blocks}
    ways: dict[int, dict[int, tuple[int, int | None, int]]] = {}  # markers -> length, next block, its markers

    def visit(at: int) -> dict[int, tuple[int, int | None, int]]:
        if at in ways:
            return ways[at]
        ways[at] = {}
        own = 0 if at in without else count(blocks[at], marker)
        length = 0 if at in without else len(blocks[at].instructions)
        following = {n for n in blocks[at].next if (at, n) not in closing}
        for n in blocks[at].next:
            if (at, n) in closing and not (loop and n == loop.header):
                following |= behind.get(n, set())
        found: dict[int, tuple[int, int | None, int]] = {}
        if at in ends or (loop is None and not following):
            found[min(own, most)] = (length, None, 0)
        for n in sorted(following & inside):
            for markers, (rest, _, _) in visit(n).items():
                way = (length + rest, n, markers)
                key = min(own + markers, most)
                found[key] = min(found.get(key, way), way, key=lambda other: other[0])
        ways[at] = found
        return found

    walked: list[Instruction] = []
    at: int | None = start
    markers = max(visit(start), default=-1)
    while at is not None and markers >= 0:
        walked += [] if at in without else blocks[at].instructions
        _, at, markers = ways[at][markers]
    return walked, [i for i in walked if re.fullmatch(marker, i.opcode)]
