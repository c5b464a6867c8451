"""A file of results, and the tables made from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grpo_kernels.cli.table import Table

Results = dict[str, Any]

_LEFT = ("provider", "accuracy")
_ALWAYS = ("provider", "median", "min", "vs eager", "accuracy")
_TIMES_OUT = "OTHER work shared these cores; look at ratios, not at times"


def load(path: Path) -> Results:
    """Reads a file of results.

    Raises:
        ValueError: it is not one.
    """
    try:
        results = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(results, dict) or not {"machine", "cases"} <= set(results):
        raise ValueError(f"{path} is not a file of results: it lacks `machine` or `cases`")
    return results


def save(results: Results, path: Path) -> None:
    """Writes JSON with one row of the tables a line: short, and readable in a diff. Unknown keys are kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in results.items() if key != "cases"]
    cases = ",\n".join(_case_text(record) for record in results["cases"])
    # Written aside first: whoever ends a run half-way finds the file of the case before.
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text("{\n" + ",\n".join([*parts, f' "cases": [\n{cases}\n ]']) + "\n}\n")
    unfinished.replace(path)


def renewed(old: Results, new: Results) -> Results:
    """The old results with the cases of the new in their places; what they lacked stands at the end.

    Percentages stay those of the limits that their own run has measured; of the machine's the best are kept.
    """
    fresh = {(record["op"], record["case"]): record for record in new["cases"]}
    cases = [fresh.pop((record["op"], record["case"]), record) for record in old["cases"]] + list(fresh.values())
    measured = {f"{record['op']}: {record['case']}" for record in cases}
    skipped = [name for name in dict.fromkeys(old["skipped"] + new["skipped"]) if name not in measured]
    seconds = old["seconds"] + new["seconds"]
    machine = _best(old["machine"], new["machine"])
    return old | new | {"machine": machine, "seconds": seconds, "skipped": skipped, "cases": cases}


def _best(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """What is said of the machine, with the higher of its limits and of its loads."""
    best = old | new
    for name in ("copy_gigabytes_per_second", "load_average"):
        if name in old:
            best[name] = max(old[name], new.get(name, 0))
    rates, more = old.get("matmul_teraflops", {}), new.get("matmul_teraflops", {})
    if rates or more:
        best["matmul_teraflops"] = {name: max(rates.get(name, 0), more.get(name, 0)) for name in rates | more}
    return best


def _case_text(record: dict[str, Any]) -> str:
    head = ", ".join(
        f"{json.dumps(key)}: {json.dumps(value)}" for key, value in record.items() if key not in ("rows", "targets")
    )
    rows = ",\n    ".join(f"{json.dumps(provider)}: {json.dumps(row)}" for provider, row in record["rows"].items())
    targets = ",\n    ".join(json.dumps(target) for target in record["targets"])
    return f'  {{{head},\n   "rows": {{\n    {rows}}},\n   "targets": [\n    {targets}]}}'


def time_text(microseconds: float | None) -> str:
    if microseconds is None:
        return "not timed"
    if microseconds >= 1e6:
        return f"{microseconds / 1e6:.3g} s"
    return f"{microseconds / 1e3:.3g} ms" if microseconds >= 1e3 else f"{microseconds:.3g} us"


def _bytes(row: dict[str, Any]) -> str:
    if "extra_bytes" not in row:
        return ""
    size = row["extra_bytes"] / 2**20
    return f"{size:.{1 if size < 10 else 0}f} MiB ({row['extra_memory_ratio']:.2f}x)"


def _remarks(row: dict[str, Any]) -> str:
    found = [row[key] for key in ("accuracy", "note") if key in row]
    if "error" in row:
        found.append(f"failed: {row['error']}")
    if "accuracy" not in row and "error" not in row and row["kind"] != "part":
        found.insert(0, "ok" if "median_us" in row else "not measured")
    return "; ".join(found)


def _number(row: dict[str, Any], key: str, form: str) -> str:
    return form.format(row[key]) if key in row else ""


def _cells(provider: str, row: dict[str, Any]) -> dict[str, str]:
    return {
        "provider": f"{provider} ({row['backend']})" if "backend" in row else provider,
        "median": time_text(row.get("median_us")),
        "min": time_text(row["min_us"]) if "min_us" in row else "",
        "spread": f"{100 * row['iqr_us'] / row['median_us']:.0f} %" if "iqr_us" in row else "",
        "vs eager": _number(row, "speedup", "{:.2f}x"),
        "GB/s": _number(row, "gigabytes_per_second", "{:.1f}"),
        "of copy": _number(row, "percent_of_copy", "{:.0f} %"),
        "TFLOP/s": _number(row, "teraflops", "{:.3g}"),
        "of matmul": _number(row, "percent_of_matmul", "{:.0f} %"),
        "of bf16 matmul": _number(row, "percent_of_bfloat16_matmul", "{:.0f} %"),
        "extra memory": _bytes(row),
        "accuracy": _remarks(row),
    }


def _style(row: dict[str, Any]) -> str | None:
    if "error" in row or "accuracy" in row:
        return "red"
    return "green" if row["kind"] == "ours" else None


def table(record: dict[str, Any]) -> Table:
    """The rows of one case; a column that would be empty is left out."""
    cells = [_cells(provider, row) for provider, row in record["rows"].items()]
    columns = [name for name in cells[0] if name in _ALWAYS or any(row[name] for row in cells)]
    made = Table(f"{record['op']}: {record['case']}", columns, right=frozenset(columns).difference(_LEFT))
    for row, source in zip(cells, record["rows"].values(), strict=True):
        made.add(*(row[name] for name in columns), style=_style(source))
    return made


def _verdict(target: dict[str, Any]) -> str:
    if target["measured"] is None:
        return f"  target {target['target']}: not measured"
    if target["met"] is None:
        return f"  {target['target']}: {target['measured']:g}"
    return f"  target {target['target']}: {target['measured']:g}, {'met' if target['met'] else 'SHORT'}"


def header(results: Results) -> list[str]:
    """What the numbers were measured on, and how."""
    info = results["machine"]
    lines = [f"{info['device']}, torch {info['torch']}, Python {info['python']}, {info['threads']} threads"]
    if "copy_gigabytes_per_second" in info:
        lines.append(f"measured copy bandwidth (read + write): {info['copy_gigabytes_per_second']:.4g} GB/s")
    if rates := info.get("matmul_teraflops"):
        text = ", ".join(f"{name} {rate:.4g} TFLOP/s" for name, rate in rates.items())
        lines.append(f"measured matmul rate: {text} (TF32 {'on' if info.get('tf32') else 'off'})")
    if info.get("load_average", 0) > info["threads"] + 0.5:
        lines.append(f"load average {info['load_average']}: {_TIMES_OUT}")
    if info.get("pages") == "recycled":
        lines.append("memory pages are recycled (glibc tunables), for every provider alike")
    elif "pages" in info:
        lines.append("memory pages are FRESH: times include page faults; `grpo-kernels bench` recycles them")
    return lines


def problems(results: Results) -> list[str]:
    """Cases that could not be measured, and rows of ours that failed or missed their accuracy budget."""
    found = []
    for record in results["cases"]:
        name = f"{record['op']}, {record['case']}"
        if "error" in record:
            found.append(f"{name}: {record['error']}")
        found += [
            f"{name}, {provider}: {row.get('error') or row['accuracy']}"
            for provider, row in record["rows"].items()
            if row["kind"] == "ours" and ("error" in row or "accuracy" in row)
        ]
    return found


def summary(results: Results) -> str:
    """How many targets were met, which were not, and what went wrong."""
    pairs = [(record, target) for record in results["cases"] for target in record["targets"]]
    judged = [(record, target) for record, target in pairs if target["met"] is not None]
    short = [f"  {record['op']}, {record['case']}:{_verdict(target)}" for record, target in judged if not target["met"]]
    lines = [f"{len(judged) - len(short)} of {len(judged)} targets met; {results['seconds']} s", *short]
    lines += [f"  {name}: skipped, no time left" for name in results["skipped"]]
    return "\n".join(lines + [f"  FAILED {problem}" for problem in problems(results)])


def show(results: Results) -> None:
    """Prints everything."""
    print("\n".join(header(results)))
    for record in results["cases"]:
        print()
        table(record).show()
        if "absent" in record:
            print(f"  not installed here: {', '.join(record['absent'])}")
        for target in record["targets"]:
            print(_verdict(target))
    print(f"\n{summary(results)}")
