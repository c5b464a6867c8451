"""The table of the gates, and the file that keeps it: bench/results/gates.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import row_file
from bench.gates import fingerprint
from grpo_kernels.cli.table import Table

Row = dict[str, Any]

PATH = Path(__file__).parents[1] / "results" / "gates.json"
COLUMNS = ("kernel", "compiler", "architecture", "compiled", "registers", "spills", "stack", "shared memory",
           "instructions", "warps of 64", "verdict")  # fmt: skip
_RIGHT = frozenset({"architecture", "compiled", "registers", "spills", "stack", "shared memory", "warps of 64"})


def kernel_name(row: Row) -> str:
    """Op, kernel and which of its specialisations."""
    variant = f", {row['variant']}" if row["variant"] else ""
    return f"{row['op']}: {row['kernel']}{variant}"


def _counts(row: Row) -> str:
    texts = []
    for label, (least, most) in row["instructions"].items():
        texts.append(f"{label} {least}" if least == most else f"{label} {least}-{most}")
    return ", ".join(texts)


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table: the worst of its specialisations."""
    return (
        kernel_name(row),
        row["compiler"],
        f"sm_{row['arch']}",
        str(row["specialisations"]),
        f"{row['registers']} of {row['register_limit']}",
        str(row["spills"]),
        str(row["stack"]),
        f"{row['shared']} of {row['shared_limit']}",
        _counts(row),
        str(row["warps"]),
        f"FAILS: {len(row['failures'])}" if row["failures"] else "ok",
    )


def order(rows: Iterable[Row]) -> list[Row]:
    """By kernel, compiler and architecture."""
    return sorted(rows, key=lambda row: (row["op"], row["kernel"], row["variant"], row["compiler"], row["arch"]))


def table(rows: Iterable[Row]) -> Table:
    result = Table("", COLUMNS, right=_RIGHT)
    for row in order(rows):
        result.add(*cells(row), style="red" if row["failures"] else None)
    return result


def load(path: Path = PATH) -> dict[str, Any]:
    """The record; empty where there is none yet."""
    return json.loads(path.read_text()) if path.is_file() else {"rows": []}


def merged(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """The new rows, and the old ones of other ops and other compilers."""
    replaced = {(row["op"], row["compiler"]) for row in new}
    return order([*new, *(row for row in old if (row["op"], row["compiler"]) not in replaced)])


def stamped(rows: Iterable[Row]) -> list[Row]:
    """The rows, each with the fingerprint of the sources it was compiled from."""
    return [{**row, "sources": fingerprint.of(row["op"], row["compiler"])} for row in rows]


def save(rows: Sequence[Row], path: Path) -> None:
    """Writes JSON with one row a line."""
    row_file.save({"rows": list(rows)}, path)
