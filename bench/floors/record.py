"""The readings of the machine code: bench/results/floors.json."""

from __future__ import annotations

import functools
import importlib
import json
import pkgutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import row_file
from bench.floors import ops
from bench.floors.floor import Floor
from bench.gates import fingerprint

Row = dict[str, Any]

PATH = Path(__file__).parents[1] / "results" / "floors.json"


def floors() -> dict[str, tuple[Floor, ...]]:
    """Name of the op -> its kernels."""
    names = sorted(module.name for module in pkgutil.iter_modules(ops.__path__))
    return {name: importlib.import_module(f"{ops.__name__}.{name}").FLOORS for name in names}


def load(path: Path = PATH) -> list[Row]:
    """The rows; none where there is no record yet."""
    rows: list[Row] = json.loads(path.read_text())["rows"] if path.is_file() else []
    return rows


def save(rows: Sequence[Row], path: Path = PATH) -> None:
    """Writes JSON with one row a line, in the order of the data."""
    order = [(op, floor.kernel, floor.form) for op, found in floors().items() for floor in found]
    ranked = sorted(rows, key=lambda row: order.index((row["op"], row["kernel"], row["form"])))
    row_file.save({"rows": ranked}, path)


def current(rows: Iterable[Row]) -> dict[tuple[str, str, str], Row]:
    """The readings by op, kernel and form; not those of other sources, or of another part of the code."""
    stamp = functools.cache(fingerprint.of)
    known = {(op, floor.kernel, floor.form): floor for op, found in floors().items() for floor in found}
    found = {}
    for row in rows:
        key = row["op"], row["kernel"], row["form"]
        fresh = row["sources"] == stamp(row["op"], row["compiler"])
        if fresh and key in known and row["selection"] == known[key].selection():
            found[key] = row
    return found
