"""Tables from a file of results: coloured on a terminal, plain text anywhere else."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

_COLUMNS = ("provider", "median", "min", "vs eager", "GB/s", "of copy", "extra memory", "accuracy")


def save(results: dict[str, Any], path: Path) -> None:
    """Writes JSON with one row of the tables a line: short, and readable in a diff."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = [f' "{key}": {json.dumps(results[key])}' for key in ("machine", "seconds", "skipped")]
    cases = ",\n".join(_case_text(record) for record in results["cases"])
    path.write_text("{\n" + ",\n".join([*parts, f' "cases": [\n{cases}\n ]']) + "\n}\n")


def _case_text(record: dict[str, Any]) -> str:
    rows = ",\n    ".join(f"{json.dumps(provider)}: {json.dumps(row)}" for provider, row in record["rows"].items())
    targets = ",\n    ".join(json.dumps(target) for target in record["targets"])
    return (
        f'  {{"op": {json.dumps(record["op"])}, "case": {json.dumps(record["case"])},\n'
        f'   "rows": {{\n    {rows}}},\n   "targets": [\n    {targets}]}}'
    )


def _time(microseconds: float | None) -> str:
    if microseconds is None:
        return "not timed"
    return f"{microseconds / 1e3:.3g} ms" if microseconds >= 1e3 else f"{microseconds:.3g} us"


def _bytes(row: dict[str, Any]) -> str:
    if "extra_bytes" not in row:
        return ""
    size = row["extra_bytes"] / 2**20
    return f"{size:.{1 if size < 10 else 0}f} MiB ({row['extra_memory_ratio']:.2f}x)"


def _cells(provider: str, row: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{provider} ({row['backend']})" if "backend" in row else provider,
        _time(row.get("median_us")),
        _time(row["min_us"]) if "min_us" in row else "",
        f"{row['speedup']:.2f}x" if "speedup" in row else "",
        f"{row['gigabytes_per_second']:.1f}" if "gigabytes_per_second" in row else "",
        f"{row['percent_of_copy']:.0f} %" if "percent_of_copy" in row else "",
        _bytes(row),
        row.get("accuracy", "ok"),
    )


def _verdict(target: dict[str, Any]) -> str:
    if target["met"] is None:
        return f"  target {target['target']}: not measured"
    return f"  target {target['target']}: {target['measured']:g}, {'met' if target['met'] else 'SHORT'}"


def header(results: dict[str, Any]) -> list[str]:
    """What the numbers were measured on, and how."""
    info = results["machine"]
    lines = [
        f"{info['device']}, torch {info['torch']}, Python {info['python']}, {info['threads']} threads",
        f"measured copy bandwidth (read + write): {info['copy_gigabytes_per_second']:.4g} GB/s",
    ]
    if info.get("load_average", 0) > info["threads"] + 0.5:
        lines.append(
            f"load average {info['load_average']}: OTHER work shared these cores; look at ratios, not at times"
        )
    if info.get("pages") == "recycled":
        lines.append("memory pages are recycled (glibc tunables), for every provider alike")
    elif "pages" in info:
        lines.append("memory pages are FRESH: times include page faults; `python -m bench` recycles them")
    return lines


def summary(results: dict[str, Any]) -> str:
    """How many targets were met, and which were not."""
    pairs = [(record, target) for record in results["cases"] for target in record["targets"]]
    judged = [(record, target) for record, target in pairs if target["met"] is not None]
    short = [f"  {record['op']}, {record['case']}:{_verdict(target)}" for record, target in judged if not target["met"]]
    short += [f"  {name}: skipped, no time left" for name in results["skipped"]]
    return "\n".join([f"{len(judged) - len(short)} of {len(judged)} targets met; {results['seconds']} s", *short])


def _plain(results: dict[str, Any]) -> None:
    for record in results["cases"]:
        table = [_COLUMNS, *(_cells(provider, row) for provider, row in record["rows"].items())]
        widths = [max(len(row[column]) for row in table) for column in range(len(_COLUMNS))]
        print(f"\n{record['op']}: {record['case']}")
        for row in table:
            print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        for target in record["targets"]:
            print(_verdict(target))


def _rich(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for record in results["cases"]:
        table = Table(title=f"{record['op']}: {record['case']}", title_justify="left", title_style="bold")
        for column in _COLUMNS:
            table.add_column(column, justify="left" if column in ("provider", "accuracy") else "right")
        for provider, row in record["rows"].items():
            table.add_row(*_cells(provider, row), style="green" if row["kind"] == "ours" else None)
        console.print(table)
        for target in record["targets"]:
            console.print(_verdict(target), style="red" if target["met"] is False else "dim", highlight=False)


def show(results: dict[str, Any]) -> None:
    """Prints everything."""
    print("\n".join(header(results)))
    try:
        (_rich if sys.stdout.isatty() else _plain)(results)
    except ImportError:
        _plain(results)
    print(f"\n{summary(results)}")
