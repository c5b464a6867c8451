"""The configurations that are tried, and which of them a GPU can hold: here those of FP8 products."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from bench.tune import tiles
from bench.tune.tiles import Tiles
from grpo_kernels.grouped_gemm._fp8_config_triton import TILE, family
from grpo_kernels.grouped_gemm._fp8_table_triton import PRODUCT, WGRAD

REGISTERS = 65536
"""Of a multiprocessor."""
_OTHER_REGISTERS = 40
"""Of a thread, beside its sums, in the leanest of the compiled kernels."""
_MIB = (16, 8, 32)
_RESERVED = 1024
"""Bytes of shared memory that a program takes beside its own."""


class Choice(NamedTuple):
    """An entry of a table. The tiles of a weight's gradient have 128 rows, and its order of work is fixed."""

    block_m: int
    num_warps: int
    num_stages: int
    specialized: bool
    on_each: int = 1
    mib: int = 16

    @property
    def threads(self) -> int:
        """Of a program. Specialised: one group of warps loads, two multiply."""
        return 32 * self.num_warps * (3 if self.specialized else 1)


AnyChoice = Choice | Tiles


class Form(NamedTuple):
    """Kernels that differ in how far ahead they load and in how many share a multiprocessor."""

    block_m: int
    num_warps: int
    specialized: bool
    stages: tuple[int, ...]
    on_each: tuple[int, ...] = (1,)


_PLAIN = (Form(64, 4, False, (3, 4), (2, 3)), Form(64, 8, False, (3, 4), (1, 2)), Form(128, 8, False, (3, 4, 5, 6)))
# Triton specialises where it is asked for four warps; on sm_100 its release 3.6 fails.
_SPECIALIZED = (Form(64, 4, True, (3, 4)), Form(128, 4, True, (3, 4, 5)))
PRODUCT_FORMS = {
    89: (Form(64, 8, False, (2, 3, 4), (1, 2)),),
    90: (*_PLAIN, *_SPECIALIZED),
    100: _PLAIN,
}
WGRAD_FORMS = {90: (_PLAIN[-1], _SPECIALIZED[-1]), 100: _PLAIN[-1:]}


class Memory(NamedTuple):
    """Bytes of shared memory that a program may have, and those of a multiprocessor."""

    program: int
    multiprocessor: int


MEMORY = {89: Memory(99 << 10, 100 << 10), 90: Memory(227 << 10, 228 << 10), 100: Memory(227 << 10, 228 << 10)}
_SUMS = {89: 32, 90: 64, 100: 64}
"""That a thread can hold: as many again come from the tensor core. On sm_89 its operands are in registers, too."""


def shared_bytes(choice: Choice) -> int:
    """At most. Specialised warps hand a tile of float32 sums through memory of its own."""
    stages = (choice.block_m + TILE) * TILE * choice.num_stages
    return stages + (128 * TILE * 4 if choice.specialized else 0) + _RESERVED


def fits(choice: Choice, family: int) -> bool:
    """Whether a GPU has the memory and the registers for so many programs at a time."""
    memory = MEMORY[family]
    workers = choice.threads - (32 * choice.num_warps if choice.specialized else 0)
    sums = choice.block_m * TILE // workers
    registers = choice.on_each * choice.threads * (2 * sums + _OTHER_REGISTERS)
    return (
        sums <= _SUMS[family]
        and registers <= REGISTERS
        and shared_bytes(choice) <= memory.program
        and choice.on_each * shared_bytes(choice) <= memory.multiprocessor
    )


def key(op: str, architecture: int) -> int:
    """The architecture under which a table has the entry: FP8 products share those of their family."""
    return architecture if op in tiles.OPS else family(architecture)


def choice_of(op: str, numbers: Iterable[Any]) -> AnyChoice:
    """From what a file says."""
    return Tiles(*numbers) if op in tiles.OPS else Choice(*numbers)


def default(op: str, architecture: int, size: str) -> AnyChoice:
    """What the package's table says, or its heuristics where they have no entry."""
    if op in tiles.OPS:
        return tiles.default(op, architecture, size)
    if op == "product":
        return Choice(*PRODUCT[family(architecture), size])
    return Choice(TILE, *WGRAD[family(architecture), size])


def _all(family: int, forms: Iterable[Form]) -> Iterator[Choice]:
    for form in forms:
        for stages, on_each in itertools.product(form.stages, form.on_each):
            choice = Choice(form.block_m, form.num_warps, stages, form.specialized, on_each)
            if fits(choice, family):
                yield choice


def _of_fp8(op: str, architecture: int, size: str) -> list[Choice]:
    first, of = Choice(*default(op, architecture, size)), family(architecture)
    if op == "wgrad":
        forms = [form for form in WGRAD_FORMS[of] if size == "aligned" or not form.specialized]
        return list(dict.fromkeys([first, *_all(of, forms)]))
    choices = [choice._replace(mib=first.mib) for choice in _all(of, PRODUCT_FORMS[of])]
    return list(dict.fromkeys([first, *choices, *(first._replace(mib=mib) for mib in _MIB)]))


def candidates(op: str, architecture: int, size: str) -> Sequence[AnyChoice]:
    """The default first. Other orders of the work are tried with the default's tiles alone."""
    return tiles.candidates(op, architecture, size) if op in tiles.OPS else _of_fp8(op, architecture, size)


def known(op: str, architecture: int, size: str, choice: AnyChoice) -> bool:
    """Whether it is one that could have been tried."""
    tried = candidates(op, architecture, size)
    of_group = choice.mib in (*_MIB, tried[0].mib)
    return of_group and any(choice == other._replace(mib=choice.mib) for other in tried)
