"""The floors in docs/kernels.md: the table, and what keeps kernels from their floors."""

from __future__ import annotations

import textwrap
from typing import Any

from bench.docs_benchmarks import markdown
from bench.floors import machine, record
from bench.floors.estimate import ISSUE, LOADS, SLACK, Estimate, estimate
from bench.floors.floor import Floor
from bench.floors.table import microseconds, name, number, widths_text
from bench.gates.gate import resident_warps

Row = dict[str, Any]

SHORT = 2e-6
"""Seconds. A floor below that is less than a launch takes: a chain of loads decides, whatever the bytes are."""

_TEXT = """\
## Floors

What each kernel has to move and compute at one shape, the least time that this takes on an H100, and what the machine
code that ships would make of it. **Nothing here was measured on a GPU.** `python -m bench.floors` compiles the kernels
for sm_90, finds the stretch of machine code where a kernel spends its time (the data names it: `bench/floors/ops`), and
counts its instructions by the unit that executes them; `make gates` does so too.

- *floor*: the bytes at {hbm:g} TB/s, or the operations of products at {bf16:g} TFLOP/s in bf16 and {fp8:g} in FP8,
  whichever takes longer. Bytes are those that memory has to give or take if caches keep what is read twice.
- *loads, stores*: bytes a thread of the instructions for global memory in that stretch, the narrowest and the widest.
- *warps*: of the 64 that a multiprocessor can hold, those that registers allow, and those that shared memory does.
- *issue*, *MUFU*, *unit*: how long the schedulers, the special-function units and the busiest other unit would take
  alone, on {multiprocessors} multiprocessors at {clock:g} GHz. One of them issues {issue} instructions of warps a
  clock, and computes {FMA} float32 multiply-adds (FMA), {ALU} integers, comparisons or selections (ALU), {XU}
  exponentials and the like (MUFU), {FP64} of float64 (FP64), and loads, stores or shuffles {LSU} times 4 bytes (LSU):
  throughputs of compute capability 9.0 in the CUDA programming guide.
- *in flight*: how long memory would take if it answers after {latency:g} us and threads have asked for no more than
  their code lets them before they wait.
- *bound by*: the longest of these, each taken alone, as if everything else were hidden behind it; a *chain of loads*
  counts those of which each waits for the one before. What nothing hides is *beside it*, and added.
- *of the floor*: that time by the floor, where the floor is {short:g} us or more; below, a launch takes longer than the
  bytes. What is over {slack:g} has its reason under the table.

A kernel with options is counted on the way that its form takes; where they are decided while it runs (`grpo_loss`),
with every option at once.
"""
_HEAD = _TEXT.format(
    hbm=machine.HBM * 1e-12,
    bf16=machine.TENSOR["bf16"] * 1e-12,
    fp8=machine.TENSOR["fp8"] * 1e-12,
    multiprocessors=machine.MULTIPROCESSORS,
    clock=machine.CLOCK * 1e-9,
    issue=machine.ISSUE // 32,
    latency=machine.LATENCY * 1e6,
    short=SHORT * 1e6,
    slack=SLACK,
    **machine.LANES,
)

COLUMNS = ("kernel", "shape", "bytes", "operations", "floor us", "loads, stores", "registers", "warps", "issue us",
           "MUFU us", "unit us", "in flight us", "bound by", "us", "of the floor")  # fmt: skip

STALE = "changed since its machine code was read"


def _warps(row: Row) -> str:
    by_registers = resident_warps(row["registers"], 0, row["threads"], machine.ARCHITECTURE)
    by_shared = resident_warps(1, row["shared"], row["threads"], machine.ARCHITECTURE)
    return f"{by_registers}, {by_shared}"


def _busiest(found: Estimate) -> str:
    units = {unit: found.times[unit] for unit in ("FMA", "ALU", "FP64", "LSU") if unit in found.times}
    unit = max(units, key=lambda name: units[name], default="")
    return f"{unit} {microseconds(units[unit])}" if unit else ""


def verdict(found: Estimate) -> str:
    """How the time compares with the floor."""
    if found.floor < SHORT:
        return "-"
    return f"{found.ratio:.2f}" + (" **over**" if found.ratio > SLACK else "")


def _bound(found: Estimate) -> str:
    hidden = f", {microseconds(found.exposed)} us beside it" if found.exposed else ""
    return found.bound + hidden


def _cells(op: str, floor: Floor, row: Row | None) -> list[str]:
    shape = " ".join(f"{key}={count:g}" for key, count in floor.shape.items())
    sizes = [f"`{op}`: `{floor.kernel}`" + (f", {floor.form}" if floor.form else ""), shape]
    sizes += [number(floor.bytes_moved()), number(floor.operations_done())]
    if row is None:
        return [*sizes, "", STALE, *[""] * (len(COLUMNS) - len(sizes) - 2)]
    found = estimate(floor, row)
    times = [microseconds(found.times.get(name)) for name in (ISSUE, "MUFU")]
    return [
        *sizes,
        microseconds(found.floor),
        widths_text(row),
        str(row["registers"]),
        _warps(row),
        *times,
        _busiest(found) or "-",
        microseconds(found.times.get(LOADS)),
        _bound(found),
        microseconds(found.time),
        verdict(found),
    ]


def _findings(op: str, floor: Floor, row: Row | None) -> list[str]:
    if not floor.finding or row is None:
        return []
    found = estimate(floor, row)
    times = f"{microseconds(found.time)} us ({_bound(found)}) against {microseconds(found.floor)} us"
    text = f"- {name(op, floor)}: {times}. {floor.finding}"
    return textwrap.wrap(text, 120, subsequent_indent="  ", break_on_hyphens=False)


def _loss(item: tuple[str, Floor, Row | None]) -> float:
    _, floor, row = item
    return estimate(floor, row).ratio if row else 0.0


def text() -> list[str]:
    """The section."""
    rows = record.current(record.load())
    items = [
        (op, floor, rows.get((op, floor.kernel, floor.form)))
        for op, found in record.floors().items()
        for floor in found
    ]
    table = [_cells(*item) for item in items]
    findings = [line for item in sorted(items, key=_loss, reverse=True) for line in _findings(*item)]
    return [
        _HEAD,
        *markdown(COLUMNS, table),
        "",
        "What keeps kernels from their floors, the worst first:",
        "",
        *findings,
    ]
