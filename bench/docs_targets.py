"""The targets of docs/benchmarks.md: what `python -m bench.targets` found on each machine."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from bench.docs_benchmarks import markdown

Results = dict[str, Any]


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3g}"


def _section(name: str, results: Results) -> list[str]:
    machine, lines = results["machine"], results["targets"]
    promised = [line for line in lines if line["verdict"] != "reported"]
    counts = {word: sum(line["verdict"] == word for line in promised) for word in ("met", "SHORT", "FAILED")}
    words = (
        f"PyTorch {machine['torch']}, {machine['threads']} threads, load average {machine['load_average']}, medians of "
        f"{results['rounds']} interleaved rounds: {counts['met']} of {len(promised)} targets are met, "
        f"{counts['SHORT']} fall short by a fifth at most, {counts['FAILED']} by more. "
        f"`bench/results/{name}` has the times and bytes behind them."
    )
    rows = [
        (f"`{line['op']}` {line['case']}", line["target"], _number(line["measured"]), line["verdict"]) for line in lines
    ]
    return [
        f"### {machine['device']}",
        "",
        *textwrap.wrap(words, 120, break_on_hyphens=False),
        "",
        *markdown(("case", "target", "measured", ""), rows),
        "",
    ]


def missed(files: Mapping[str, Results]) -> list[tuple[str, str, str]]:
    """(op, case, target) of everything that is short on one of the machines."""
    return [
        (line["op"], line["case"], line["target"])
        for results in files.values()
        for line in results["targets"]
        if line["verdict"] in ("SHORT", "FAILED")
    ]


def text(files: Mapping[str, Results]) -> str:
    """A table for each machine."""
    lines = [line for name, results in files.items() for line in _section(name, results)]
    return "\n".join(lines or ["No machine has been measured yet."]).strip()
