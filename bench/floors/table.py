"""The floors as tables: on the screen, and in docs/kernels.md."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bench.floors import record
from bench.floors.estimate import LOADS, MEMORY, SLACK, Estimate, estimate
from bench.floors.floor import Floor
from grpo_kernels.cli.table import Table

Row = dict[str, Any]

COLUMNS = ("kernel", "shape", "bytes", "operations", "floor us", "loads, stores", "registers", "shared", "warps of 64",
           "issue us", "MUFU us", "in flight us", "bound by", "us", "of the floor")  # fmt: skip


def number(count: float) -> str:
    """1234567 as 1.23 M."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.3g}"


def microseconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    value = seconds * 1e6
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def name(op: str, floor: Floor) -> str:
    return f"{op}: {floor.kernel}" + (f", {floor.form}" if floor.form else "")


def widths_text(row: Row) -> str:
    """Bytes a thread of the loads and stores of global memory, in the main stretch where there is one."""
    found: dict[str, list[int]] = {}
    for part in row["parts"] or [row]:
        for kind, (least, most) in part["widths"].items():
            before = found.setdefault(kind, [least, most])
            found[kind] = [min(before[0], least), max(before[1], most)]
    texts = [
        "TMA" if kind == "load" and row["tma"] else "-" if kind not in found else "-".join(
            dict.fromkeys(map(str, found[kind]))
        )
        for kind in ("load", "store")
    ]  # fmt: skip
    return ", ".join(texts)


def cells(op: str, floor: Floor, row: Row, found: Estimate) -> tuple[str, ...]:
    """A row of the table."""
    shape = " ".join(f"{key}={number_of:g}" for key, number_of in floor.shape.items())
    times = found.times
    return (
        name(op, floor),
        shape,
        number(floor.bytes_moved()),
        number(floor.operations_done()),
        microseconds(found.floor),
        widths_text(row),
        str(row["registers"]),
        str(row["shared"]),
        str(row["warps"]),
        microseconds(times.get("issue slots")),
        microseconds(times.get("MUFU")),
        microseconds(times.get(LOADS)),
        found.bound + (f", and {microseconds(found.exposed)} us that nothing hides" if found.exposed else ""),
        microseconds(found.time),
        f"{found.ratio:.2f}",
    )


def shown(rows: Iterable[Row]) -> Table:
    """The table of these readings."""
    result = Table("", COLUMNS, right=frozenset(COLUMNS) - {"kernel", "shape", "bound by"})
    current = record.current(rows)
    for op, floors in record.floors().items():
        for floor in floors:
            row = current.get((op, floor.kernel, floor.form))
            if row is not None:
                found = estimate(floor, row)
                slow = found.ratio > SLACK and found.bound != MEMORY
                result.add(*cells(op, floor, row, found), style="red" if slow else None)
    return result
