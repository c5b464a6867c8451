"""Who competes in docs/benchmarks.md, where they were timed, and who has not been run yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.docs_benchmarks import markdown

Results = dict[str, Any]


def _once(values: list[str], value: str) -> None:
    if value not in values:
        values.append(value)


def _is_peer(name: str, row: dict[str, Any]) -> bool:
    """Other ways to call ours compete too, and are no peers."""
    return row["kind"] == "peer" and not name.startswith("ours")


def text(files: Mapping[str, Results]) -> str:
    """Peers by name: the ops in which they compete, and the machines on which one of their rows was timed."""
    ops: dict[str, list[str]] = {}
    machines: dict[str, list[str]] = {}
    for results in files.values():
        for record in results["cases"]:
            timed = {n: "median_us" in row for n, row in record["rows"].items() if _is_peer(n, row)}
            for name, has_time in (timed | dict.fromkeys(record.get("absent", ()), False)).items():
                _once(ops.setdefault(name, []), f"`{record['op']}`")
                where = machines.setdefault(name, [])
                if has_time:
                    _once(where, results["machine"]["device"])
    rows = [(name, ", ".join(ops[name]), "; ".join(machines[name]) or "**not run yet**") for name in sorted(ops)]
    return "\n".join(markdown(("peer", "beside", "timed on"), rows) if rows else ["Nobody has been timed yet."])


def versions(files: Mapping[str, Results]) -> str:
    """Of the packages that took part, for each machine whose record has them."""
    found = [
        f"- {results['machine']['device']}: " + ", ".join(f"{name} {version}" for name, version in packages.items())
        for results in files.values()
        if (packages := results["machine"].get("packages"))
    ]
    return "\n".join(found)
