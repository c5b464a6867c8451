"""Two files of results beside each other, and which rows of ours became slower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from grpo_kernels.cli.table import Table

from .report import Results, time_text

DEFAULT_LIMIT = 1.2
SAME_MACHINE = ("device", "threads", "pages", "host")
_SAME_VERSIONS = ("torch", "triton", "cuda", "python")


@dataclass(frozen=True)
class Change:
    """One row of both files; a time is None where that file has none.

    A row of ours is slower if its median, its minimum, and its time in proportion to eager PyTorch's all grew by more
    than the limit: the first moves with whatever else the machine does, and where the whole machine is slower, eager
    PyTorch, which took turns with ours, is so too. A row is lost if the new file has the case, but no time for the row.
    """

    case: str
    provider: str
    kind: str
    old: dict[str, Any]
    new: dict[str, Any]
    eager_ratio: float | None

    @property
    def ratio(self) -> float | None:
        return _ratio(self.old, self.new, "median_us")

    @property
    def lost(self) -> bool:
        return self.kind == "ours" and "median_us" in self.old and "median_us" not in self.new

    def slower(self, limit: float) -> bool:
        """Whether this is a regression."""
        shortest = _ratio(self.old, self.new, "min_us")
        if self.kind != "ours" or self.ratio is None or shortest is None:
            return self.lost
        return min(self.ratio, shortest, self.ratio / (self.eager_ratio or 1.0)) > limit


def _ratio(old: dict[str, Any], new: dict[str, Any], field: str) -> float | None:
    return float(new[field] / old[field]) if field in old and field in new else None


def differences(old: Results, new: Results, fields: tuple[str, ...] = SAME_MACHINE) -> list[str]:
    """In what the machines differ, each as "device: A, now B"."""
    a, b = old["machine"], new["machine"]
    return [f"{name}: {a.get(name)}, now {b.get(name)}" for name in fields if a.get(name) != b.get(name)]


def changes(old: Results, new: Results) -> list[Change]:
    """Every row that both files have; a row that only the old file has if the new one has its case."""
    before = {(record["op"], record["case"]): record["rows"] for record in old["cases"]}
    found = []
    for record in new["cases"]:
        rows = before.get((record["op"], record["case"]), {})
        name = f"{record['op']}: {record['case']}"
        pairs = [(provider, row, record["rows"].get(provider, {})) for provider, row in rows.items()]
        eager = next((_ratio(old, new, "median_us") for _, old, new in pairs if old["kind"] == "eager"), None)
        found += [Change(name, provider, old["kind"], old, new, eager) for provider, old, new in pairs]
    return found


def _cells(change: Change, limit: float) -> tuple[str, ...]:
    verdict = ""
    if change.slower(limit):
        verdict = "LOST" if change.lost else "SLOWER"
    elif change.ratio is not None and change.ratio < 1 / limit:
        verdict = "faster"
    return (
        change.provider,
        time_text(change.old.get("median_us")),
        time_text(change.new.get("median_us")),
        "" if change.ratio is None else f"{change.ratio:.2f}",
        verdict,
    )


def show(old: Results, new: Results, limit: float) -> int:
    """Prints old, new and ratio of every row that both have; returns how many rows of ours are slower or lost."""
    for text in differences(old, new, SAME_MACHINE + _SAME_VERSIONS):
        print(f"compared with another setting: {text}")
    found = changes(old, new)
    if not found:
        print("nothing to compare: the files share no case")
    for case in dict.fromkeys(change.case for change in found):
        table = Table(case, ("provider", "old", "new", "new / old", ""), right=frozenset(("old", "new", "new / old")))
        for change in found:
            if change.case == case:
                table.add(*_cells(change, limit), style="red" if change.slower(limit) else None)
        print()
        table.show()
    slower, ours = sum(change.slower(limit) for change in found), sum(change.kind == "ours" for change in found)
    print(f"\n{slower} of {ours} rows of ours are lost, or more than {limit:g}x slower")
    return slower
