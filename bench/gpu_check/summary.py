"""One screen, last: what matters of each phase, what failed, and where the rest is."""

from __future__ import annotations

import statistics
from typing import Any

from bench.gpu_check.results import FAIL, LATE, PASS, Results

LINES = 30
WIDTH = 132


_LIMITS = {"percent_of_copy": "copy bandwidth", "percent_of_matmul": "the matmul rate"}


def _rates(bench: dict[str, Any]) -> list[str]:
    """For every op, what its best provider reaches: of the machine's limit, and against eager PyTorch."""
    found: dict[str, dict[str, list[float]]] = {}
    for case in bench["cases"]:
        ours = [row for row in case.get("rows", {}).values() if row.get("kind") == "ours" and "median_us" in row]
        if not ours:
            continue
        values = found.setdefault(case["op"], {})
        best = min(ours, key=lambda row: float(row["median_us"]))
        for key in (*_LIMITS, "speedup"):
            if key in best:
                values.setdefault(key, []).append(best[key])
    lines = []
    for op, values in found.items():
        shares = [
            f"{min(values[k]):.0f} to {max(values[k]):.0f} % of {name}" for k, name in _LIMITS.items() if k in values
        ]
        ratios = values.get("speedup", [])
        eager = f", median {statistics.median(ratios):.1f}x eager" if ratios else ""
        lines.append(f"    {op}: {', '.join(shares) or 'no bandwidth'}{eager}, {len(ratios)} cases")
    return lines


def _targets(bench: dict[str, Any]) -> str:
    judged = [t for case in bench["cases"] for t in case.get("targets", ()) if t.get("met") is not None]
    short = sum(not target["met"] for target in judged)
    skipped = len(bench.get("skipped", ()))
    return f"{len(judged) - short} targets met, {short} short; {len(bench['cases'])} cases, {skipped} skipped"


def lines_of(results: Results, seconds: float) -> list[str]:
    """The summary, at most `LINES` lines."""
    checks = results.ordered()
    body = []
    for check in checks:
        note = check.note
        if check.phase == "benchmarks" and results.bench and check.verdict in (PASS, FAIL, LATE):
            note = _targets(results.bench) if check.verdict == PASS else f"{_targets(results.bench)}; {note}"
        if check.phase == "verify" and results.verify and not check.note.startswith("stopped"):
            note = results.verify["summary"]
        if check.failed:  # named below
            note = note.partition("; failed:")[0]
        took = "  kept" if check.kept else f"{check.seconds:4.0f} s"
        body.append(f"  {check.verdict.upper():4}  {check.phase:<11} {took}  {note}")
        if check.phase == "benchmarks" and results.bench:
            body += _rates(results.bench)
    counts = [f"{sum(c.verdict == word for c in checks)} {word}" for word in (PASS, FAIL, LATE, "skip")]
    head = "REHEARSAL on the CPU: this proves nothing about CUDA" if results.settings.rehearse else "gpu-check"
    machine = results.machine["machine"].get("device", "unknown device")
    first = f"{head}; {machine}; {', '.join(counts)}; {seconds:.0f} s"
    written = (results.file, results.log, results.state, results.tuning)
    files = [path.name for path in written if path.exists()]
    last = f"in {results.settings.output}: {', '.join(files)}"
    failed = [name for check in checks for name in check.failed]
    room = max(0, LINES - 3 - len(body))
    named = [f"    FAILED {name}" for name in failed[: room - 1 if len(failed) > room else room]]
    if len(failed) > len(named) and room:
        named.append(f"    and {len(failed) - len(named)} more failed tests: see the log")
    return [line[:WIDTH] for line in (first, *body[: LINES - 2], *named)] + [last]


def status(results: Results) -> int:
    """0 only if nothing failed and nothing was left undone."""
    return 1 if any(check.verdict in (FAIL, LATE) for check in results.ordered()) or not results.checks else 0
