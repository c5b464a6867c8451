"""Checks every op and backend, value and gradient, against float64 on this machine's devices; exits 1 on a failure."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch

import grpo_kernels
from grpo_kernels import _dispatch
from grpo_kernels.cli.env import devices, versions
from grpo_kernels.cli.table import Table
from grpo_kernels.testing import verification
from grpo_kernels.testing.verification.case import EVERY_DTYPE, Case
from grpo_kernels.testing.verification.engine import Target
from grpo_kernels.testing.verification.report import FAILED, NOT_AVAILABLE, PASSED, Report, Row, dtype_name

_SHOWN_FAILURES = 20
_STYLES = {PASSED: None, FAILED: "red", NOT_AVAILABLE: "dim"}
_COLUMNS = ("op", "backend", "device", "dtype", "cases", "error", "budget", "verdict", "closest to its budget")
_RIGHT = frozenset({"cases", "error", "budget"})
Work = list[tuple[Case, list[Target]]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to check, and how to report it. Options that choose may be given several times."""

    def choose(option: str, help_text: str, choices: Iterable[str] | None = None) -> None:
        parser.add_argument(option, action="append", choices=choices, metavar=option[2:].upper(), help=help_text)

    dtypes = [dtype_name(dtype) for dtype in EVERY_DTYPE]
    choose("--device", "cpu, cuda (every CUDA device) or cuda:N; all devices by default")
    choose("--op", f"one of {', '.join(_dispatch.public_ops())}; all by default", list(_dispatch.public_ops()))
    choose("--backend", f"one of {', '.join(_dispatch.BACKENDS)}; all by default", _dispatch.BACKENDS)
    choose("--dtype", f"one of {', '.join(dtypes)}; all by default", dtypes)
    choose("--case", "only cases whose name contains this text")
    parser.add_argument("--verbose", action="store_true", help="a row for every case")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write versions, devices, rows and failures there")


def run(arguments: argparse.Namespace) -> int:
    """The exit status: 0 if everything was verified, 1 on a failure, 2 if the options make no sense here."""
    start = time.perf_counter()
    try:
        chosen = _devices(arguments.device)
        if arguments.json is not None and not arguments.json.parent.is_dir():
            raise ValueError(f"--json: there is no folder {arguments.json.parent}")
    except ValueError as error:
        print(f"grpo-kernels verify: {error}", file=sys.stderr)
        return 2
    report = Report()
    work = _plan(report, chosen, arguments)
    dtypes = [dtype for dtype in EVERY_DTYPE if not arguments.dtype or dtype_name(dtype) in arguments.dtype]
    for case, targets in _with_progress(work):
        report.outcomes += verification.check(case, targets, [dtype for dtype in dtypes if dtype in case.dtypes])
    summary = report.summary(time.perf_counter() - start)
    _show(report, arguments.verbose)
    if arguments.json is not None:
        _write(arguments.json, report, summary, time.perf_counter() - start)
    print(summary)
    return 0 if report.verified() else 1


def _devices(names: list[str] | None) -> list[torch.device]:
    """The devices that were asked for, or all.

    Raises:
        ValueError: one is not there.
    """
    present = [torch.device(kind) if index < 0 else torch.device(kind, index) for kind, index, _ in devices()]
    chosen: list[torch.device] = []
    for name in names or ["cpu", *({"cuda"} if len(present) > 1 else {})]:
        found = [device for device in present if name in (device.type, str(device))]
        if not found:
            raise ValueError(f"--device: there is no {name}; here are {', '.join(map(str, present))}")
        chosen += [device for device in found if device not in chosen]
    return chosen


def _plan(report: Report, chosen: list[torch.device], arguments: argparse.Namespace) -> Work:
    """The cases to run and the backends to run them on; notes in the report what cannot be run."""
    work: Work = []
    for op, cases in verification.cases().items():
        if arguments.op and op not in arguments.op:
            continue
        if not cases:
            report.without_cases.append(op)
        available = []
        for device in chosen:
            for target in _targets(op, device, arguments.backend):
                reason = target.problem()
                if reason:
                    report.unavailable.append((target, reason))
                else:
                    available.append(target)
        named = [case for case in cases if not arguments.case or any(text in case.name for text in arguments.case)]
        work += [(case, available) for case in named]
    return work


def _targets(op: str, device: torch.device, backends: list[str] | None) -> list[Target]:
    """The op's backends for the device; those that were asked for, even if it has no such kernels."""
    if not backends:
        return verification.targets(op, device)
    return [Target(op, name, device) for name in dict.fromkeys(backends)]


def _with_progress(work: Work) -> Iterable[tuple[Case, list[Target]]]:
    """The same, with a bar on the terminal that goes away at the end."""
    if not sys.stderr.isatty():
        return work
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        return work
    return track(work, "verifying", console=Console(stderr=True), transient=True)


def _show(report: Report, every_case: bool) -> None:
    title = f"grpo_kernels {grpo_kernels.__version__}, torch {torch.__version__}"
    table = Table(title, _COLUMNS, right=_RIGHT, spare=_COLUMNS[-1])
    for row in report.rows(every_case):
        table.add(*_cells(row), style=_STYLES[row.verdict])
    table.show()
    for where, reason in dict.fromkeys(
        (f"{target.backend} on {target.device}", why) for target, why in report.unavailable
    ):
        print(f"not available: {where}: {reason}")
    failures = report.failures()
    for row in failures if every_case else failures[:_SHOWN_FAILURES]:
        print(f"FAILED {row.describe()}")
    if len(failures) > _SHOWN_FAILURES and not every_case:
        print(f"... and {len(failures) - _SHOWN_FAILURES} more failures: --verbose shows them")


def _cells(row: Row) -> tuple[str, ...]:
    place = (row.op, row.backend, row.device, row.dtype, str(row.cases or ""))
    numbers = _number(row.error), _number(row.budget) if row.budget else "exact"
    closest = f"{row.case}: {row.tensor}" if row.error else row.case if row.problem or row.cases == 1 else ""
    return (*place, *(numbers if row.tensor else ("", "")), row.verdict, closest)


def _number(value: float) -> str:
    return f"{value:.1e}" if value else "0"


def _write(path: Path, report: Report, summary: str, seconds: float) -> None:
    results = {
        "verified": report.verified(),
        "summary": summary,
        "seconds": round(seconds, 1),
        "versions": {row[0]: row[1] for row in versions()},
        "devices": {kind if index < 0 else f"{kind}:{index}": text for kind, index, text in devices()},
        "rows": [row.to_dict() for row in report.rows()],
        "failures": [row.to_dict() for row in report.failures()],
    }
    path.write_text(json.dumps(results, indent=1) + "\n")
