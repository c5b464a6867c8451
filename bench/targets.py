"""`python -m bench.targets`: the targets of the design, measured on this machine in one run and judged.

Every case takes nine rounds of all providers that its targets speak of, in turn; ratios are those of medians. Peak
memory follows in fresh processes. The record is bench/results/targets-<machine>.json. The exit status is 1 if a target
was not measured, or is missed by more than a fifth; a smaller miss reads SHORT.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import machine, progress, row_file, run
from bench.case import Case
from bench.measure import Effort
from bench.target import Row
from grpo_kernels.cli.table import Table

RESULTS = Path(__file__).parent / "results"
ROUNDS = 9
SPARE = 0.8  # of its target is what a figure of a machine that others use may fall to
EFFORT = Effort(seconds=0.0, minimum_rounds=ROUNDS, maximum_rounds=ROUNDS)

# The ops of section 9 of the design that have a target on this type of device.
_EVERYWHERE = (
    "group_advantages", "token_log_probs", "grpo_loss", "linear_token_log_probs", "linear_grpo_loss", "moe_router",
    "build_permutation", "moe_permute", "moe_unpermute",
)  # fmt: skip
OPS = {"cpu": _EVERYWHERE, "cuda": (*_EVERYWHERE, "fp8_quantize", "moe_permute_quantize", "grouped_gemm")}

Judged = dict[str, Any]
Results = dict[str, Any]


class _Reads(Mapping[str, Row]):
    """Rows without figures that remember which of them a target looked at."""

    def __init__(self, case: Case) -> None:
        self._rows: dict[str, Row] = {provider.name: {"kind": provider.kind} for provider in case.providers}
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> Row:
        row = self._rows[name]
        self.names.add(name)
        return row

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def trimmed(case: Case) -> Case:
    """The case with the baseline and what its targets speak of."""
    reads = _Reads(case)
    for target in case.targets:
        target.value(reads)
    kept = tuple(p for p in case.providers if p.kind == "eager" or p.name in reads.names)
    return dataclasses.replace(case, providers=kept)


def cases(device: str, ops: Sequence[str]) -> list[Case]:
    """Those of these ops that have a target."""
    return [trimmed(case) for case in run.cases(device) if case.op in ops and case.targets]


def verdict(measured: float | None, limit: float | None, at_least: bool) -> str:
    """ "met", "SHORT" by a fifth at most, "FAILED", or "reported" where the design only wants the figure."""
    if measured is None:
        return "FAILED"
    if limit is None:
        return "reported"
    if measured >= limit if at_least else measured <= limit:
        return "met"
    return "SHORT" if (measured >= SPARE * limit if at_least else measured <= limit / SPARE) else "FAILED"


def _why(record: dict[str, Any]) -> str:
    """What kept a case or a provider from being measured, or ""."""
    problems = [record["error"]] if "error" in record else []
    problems += [
        f"{provider}: {row.get('error') or row['accuracy']}"
        for provider, row in record["rows"].items()
        if "error" in row or ("accuracy" in row and "median_us" not in row)
    ]
    return "; ".join(problems)


def judged(results: Results) -> list[Judged]:
    """Every target of a run, in the order of the cases."""
    found = []
    for record in results["cases"]:
        for target in record["targets"]:
            measured, limit = target["measured"], target["limit"]
            line = {
                "op": record["op"],
                "case": record["case"],
                "target": target["target"],
                "limit": limit,
                "measured": measured,
                "verdict": verdict(measured, limit, target["at_least"]),
            }
            found.append(line if measured is not None else line | {"why": _why(record)})
    return found


def figures(results: Results) -> list[dict[str, Any]]:
    """Medians and peak memory behind the ratios."""
    fields = ("median_us", "iqr_us", "extra_bytes")
    return [
        {
            "op": record["op"],
            "case": record["case"],
            "rows": {
                name: {field: row[field] for field in fields if field in row} for name, row in record["rows"].items()
            },
        }
        for record in results["cases"]
    ]


def measure(device: str, chosen: Sequence[Case], display: progress.Progress, effort: Effort = EFFORT) -> Results:
    """The content of the record."""
    results = run.run(device, effort, chosen, display)
    return {
        "kind": "targets",
        "machine": results["machine"],
        "seconds": results["seconds"],
        "rounds": effort.minimum_rounds,
        "targets": judged(results),
        "figures": figures(results),
    }


_STYLES = {"met": "green", "reported": "dim", "SHORT": "yellow", "FAILED": "red"}


def show(results: Results) -> None:
    """The table, and how many targets were met."""
    info = results["machine"]
    print(f"{info['device']}, torch {info['torch']}, {info['threads']} threads, load average {info['load_average']}")
    table = Table(
        "", ("op", "case", "target", "measured", "verdict", "why"), right=frozenset(("measured",)), spare="why"
    )
    for line in results["targets"]:
        measured = "" if line["measured"] is None else f"{line['measured']:.3g}"
        cells = (line["op"], line["case"], line["target"], measured, line["verdict"], line.get("why", ""))
        table.add(*cells, style=_STYLES[line["verdict"]])
    table.show()
    verdicts = [line["verdict"] for line in results["targets"] if line["verdict"] != "reported"]
    counts = ", ".join(f"{verdicts.count(word)} {word}" for word in ("met", "SHORT", "FAILED"))
    print(f"{len(verdicts)} targets: {counts}; {results['rounds']} rounds, {results['seconds']} s")


def status(results: Results) -> int:
    """1 if a target failed."""
    return int(any(line["verdict"] == "FAILED" for line in results["targets"]))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.targets", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=machine.default_device())
    parser.add_argument("--op", action="append", metavar="OP", help="this op alone (repeatable); nothing is saved then")
    parser.add_argument("--save", type=Path, metavar="FILE", help="instead of bench/results/targets-<machine>.json")
    arguments = parser.parse_args()
    known = OPS[arguments.device]
    if unknown := set(arguments.op or ()) - set(known):
        parser.error(f"--op must be one of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    machine.recycle_pages(arguments.device, [sys.executable, "-m", "bench.targets", *sys.argv[1:]])
    with progress.shown() as display:
        results = measure(arguments.device, cases(arguments.device, arguments.op or known), display)
    path = arguments.save or (None if arguments.op else RESULTS / f"targets-{machine.slug(arguments.device)}.json")
    if path is not None:
        row_file.save(results, path)
        print(f"written: {path}")
    show(results)
    return status(results)


if __name__ == "__main__":
    sys.exit(main())
