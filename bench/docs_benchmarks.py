"""The tables of results in docs/benchmarks.md: what was measured on each machine, and the targets that are missed."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.report import time_text

Results = dict[str, Any]
Row = dict[str, Any]


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table; columns that hold nothing are left out."""
    rows = [list(row) for row in rows]
    kept = [index for index in range(len(columns)) if any(row[index] for row in rows)]
    lines = [[columns[index] for index in kept], ["---"] * len(kept), *([row[index] for index in kept] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def fastest(rows: Mapping[str, Row], kind: str) -> tuple[str, Row] | None:
    """Name and row of the provider of this kind with the smallest median; None if none was timed."""
    timed = [(name, row) for name, row in rows.items() if row["kind"] == kind and "median_us" in row]
    return min(timed, key=lambda pair: pair[1]["median_us"], default=None)


_LIMITS = (
    ("percent_of_copy", "copy"),
    ("percent_of_matmul", "matmul"),
    ("percent_of_bfloat16_matmul", "bf16 matmul"),
)


def limit_text(row: Row) -> str:
    """Which share of the machine's limit a row reaches, empty where none applies."""
    texts = [f"{row[key]:.0f} % of {limit}" for key, limit in _LIMITS if key in row]
    return ", ".join(texts)


def against(other: Row | None, ours: Row, digits: str) -> str:
    """How many times as long another row takes as ours; * where it misses the accuracy budget."""
    if other is None:
        return ""
    return f"{other['median_us'] / ours['median_us']:{digits}}x" + (" *" if "accuracy" in other else "")


def against_peer(rows: Mapping[str, Row], ours: Row, digits: str) -> str:
    """The same of the fastest of the other packages and other ways, and its name."""
    name, peer = fastest(rows, "peer") or ("", None)
    return f"{against(peer, ours, digits)} {name}".strip()


def memory_text(ours: Row, eager: Row | None) -> str:
    """Memory of both above the inputs, empty where it was not measured."""
    if "extra_bytes" not in ours or eager is None or "extra_bytes" not in eager:
        return ""
    sizes = [row["extra_bytes"] / 2**20 for row in (ours, eager)]
    return " / ".join(f"{size:.{1 if size < 10 else 0}f}" for size in sizes) + " MiB"


def _case(record: dict[str, Any]) -> list[str]:
    rows = record["rows"]
    name = f"`{record['op']}` {record['case']}"
    best = fastest(rows, "ours")
    if best is None:
        return [name, "not timed", *[""] * 7]
    provider, ours = best
    others = [pair and pair[1] for pair in (fastest(rows, "eager"), fastest(rows, "compile"))]
    return [
        name + provider.removeprefix("ours"),
        time_text(ours["median_us"]),
        *(time_text(other["median_us"]) if other else "" for other in others),
        *(against(other, ours, ".1f") for other in others),
        against_peer(rows, ours, ".1f"),
        limit_text(ours),
        memory_text(ours, others[0]),
    ]


_COLUMNS = ("case", "ours", "eager", "`torch.compile`", "against eager", "against `torch.compile`",
            "against the fastest peer", "of the limit", "memory: ours / eager")  # fmt: skip


def _limits(machine: Mapping[str, Any]) -> str:
    """The measured limits that percentages refer to."""
    texts = []
    if "copy_gigabytes_per_second" in machine:
        texts.append(f"a large copy moves {machine['copy_gigabytes_per_second']:g} GB/s")
    rates = [f"{rate:g} TFLOP/s in {dtype}" for dtype, rate in machine.get("matmul_teraflops", {}).items()]
    if rates:
        texts.append(f"the limit of matrix products is {', '.join(rates)}")
    return ", ".join(texts) or "its limits were not measured"


def _section(name: str, results: Results) -> list[str]:
    machine = results["machine"]
    load = machine.get("load_average", 0)
    quiet = "" if load <= machine["threads"] + 0.5 else f" Other work shared its cores (load average {load})."
    words = (
        f"PyTorch {machine['torch']}, {machine['threads']} threads; {_limits(machine)}.{quiet} Medians; memory above "
        f"the inputs; an asterisk marks what misses the accuracy budget. `bench/results/{name}` has every row."
    )
    lines = [f"### {machine['device']}", "", *textwrap.wrap(words, 120, break_on_hyphens=False), ""]
    lines += [*markdown(_COLUMNS, (_case(record) for record in results["cases"])), ""]
    missed = [
        (f"`{record['op']}` {record['case']}", target["target"], f"{target['measured']:.3g}")
        for record in results["cases"]
        for target in record["targets"]
        if target["met"] is False
    ]
    judged = sum(target["met"] is not None for record in results["cases"] for target in record["targets"])
    lines += [f"{judged - len(missed)} of {judged} targets are met" + (". Missed:" if missed else "."), ""]
    if missed:
        lines += [*markdown(("case", "target", "measured"), missed), ""]
    if results["skipped"]:
        lines += [f"Not measured, the time was over: {'; '.join(results['skipped'])}.", ""]
    return lines


def missed(files: Mapping[str, Results]) -> list[tuple[str, str, str]]:
    """(op, case, target) of every target that is missed on one of the machines."""
    return [
        (record["op"], record["case"], target["target"])
        for results in files.values()
        for record in results["cases"]
        for target in record["targets"]
        if target["met"] is False
    ]


def text(files: Mapping[str, Results]) -> str:
    """A section for each machine."""
    lines = [line for name, results in files.items() for line in _section(name, results)]
    if not any(results["machine"].get("cuda") for results in files.values()):
        lines.append("No GPU has been measured yet.")
    return "\n".join(lines).strip()
