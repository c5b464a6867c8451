"""What `grpo-kernels bench` does; its options stand in grpo_kernels/cli/bench.py."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import sys
from pathlib import Path

import torch

from . import compare, machine, progress, report

_WRONG_USE = 2


class UsageError(Exception):
    """What the caller asked for cannot be done; the message says why."""


def _again(arguments: argparse.Namespace) -> list[str]:
    """The command line that gives these arguments."""
    line = [sys.executable, "-m", "grpo_kernels.cli", arguments.command]
    for name, value in vars(arguments).items():
        option = f"--{name.replace('_', '-')}"
        if name == "command" or value is None or value is False:
            continue
        if value is True:
            line.append(option)
        else:
            for item in value if isinstance(value, list) else [value]:
                line += [option, str(item)]
    return line


def _device(arguments: argparse.Namespace) -> str:
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch.cuda sees no device")
    return str(arguments.device or machine.default_device())


def _check(arguments: argparse.Namespace) -> report.Results | None:
    """Everything that would fail after the measurement, before it; returns the results to compare with."""
    from . import run

    known = run.names("cpu")
    if unknown := set(arguments.op or ()) - set(known):
        raise UsageError(f"--op must be one of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    if arguments.fail_above is not None and arguments.compare is None:
        raise UsageError("--fail-above needs --compare")
    if arguments.renew and not arguments.save:
        raise UsageError("--renew needs --save")
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib (pip install matplotlib)")
    return _load(arguments.compare) if arguments.compare else None


def _load(path: Path) -> report.Results:
    try:
        return report.load(path)
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error


def _list(arguments: argparse.Namespace) -> None:
    from . import run

    for case in run.choose(_device(arguments), arguments.op, arguments.quick):
        print(f"{case.op}: {case.name}{' (host clock)' if case.clock == 'host' else ''}")
        print(f"  {'; '.join(provider.name for provider in case.providers)}")


def _path(arguments: argparse.Namespace, device: str) -> Path | None:
    path: Path | None = arguments.save
    if path is not None and (path.is_dir() or not path.suffix):
        return path / f"{machine.slug(device)}.json"
    return path


def _kept(path: Path, device: str) -> report.Results:
    """The results that are to be renewed: of this machine, or the file would hold two under one name."""
    old = _load(path)
    if found := compare.differences(old, {"machine": machine.describe(device)}, (*compare.SAME_MACHINE, "torch")):
        raise UsageError(f"--renew needs results of the same machine: {'; '.join(found)}")
    return old


def _measure(arguments: argparse.Namespace) -> report.Results:
    device = _device(arguments)
    machine.recycle_pages(device, _again(arguments))
    from . import run

    given = {name: getattr(arguments, name) for name in ("seconds", "deadline") if getattr(arguments, name)}
    effort = dataclasses.replace(run.QUICK if arguments.quick else run.FULL, **given)
    if arguments.first:
        effort = dataclasses.replace(effort, first=tuple(arguments.first))
    path = _path(arguments, device)
    kept = _kept(path, device) if arguments.renew and path is not None and path.is_file() else None

    def keep(results: report.Results) -> None:
        if path is not None:
            report.save(report.renewed(kept, results) if kept else results, path)

    with progress.shown() as display:
        results = run.run(device, effort, run.choose(device, arguments.op, arguments.quick), display, keep)
    keep(results)
    report.show(results)
    if path is not None:
        print(f"written: {path}")
    return results


def _compare(old: report.Results, new: report.Results, fail_above: float | None) -> int:
    """Exit status. Times of two machines cannot be judged, so that is refused where a verdict is asked for."""
    print()
    if fail_above is not None and (found := compare.differences(old, new)):
        raise UsageError(f"--fail-above needs results of the same machine: {'; '.join(found)}")
    slower = compare.show(old, new, fail_above or compare.DEFAULT_LIMIT)
    return 1 if fail_above is not None and slower else 0


def run(arguments: argparse.Namespace) -> int:
    """Exit status: 1 if a kernel of ours failed, missed its accuracy budget, or got slower than `--fail-above` allows;
    2 for wrong use; else 0.
    """
    try:
        old = _check(arguments)
        if arguments.list:
            _list(arguments)
            return 0
        if arguments.results:
            results = _load(arguments.results)
            report.show(results)
        else:
            results = _measure(arguments)
        status = 1 if report.problems(results) else 0
        if old is not None:
            status = max(status, _compare(old, results, arguments.fail_above))
        if arguments.plot:
            from . import plot

            for path in plot.draw(results, arguments.plot):
                print(f"drawn: {path}")
        return status
    except UsageError as error:
        print(f"grpo-kernels bench: {error}", file=sys.stderr)
        return _WRONG_USE
