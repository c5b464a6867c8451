"""The command; see bench/tune/__init__.py."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import bench.tune as package
from bench import machine
from bench.gpu_check import processes
from bench.gpu_check.phases import NOT_RUN, SKIPPED
from bench.tune import choose, problems, table
from bench.tune.trials import Trials

OPS = ("grouped_gemm",)
SECONDS = 150.0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tune", description=package.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", choices=OPS, default=OPS[0], help="the only one so far with tables")
    parser.add_argument("--save", type=Path, metavar="FILE", help="where the measurements go; otherwise only printed")
    parser.add_argument("--apply", type=Path, nargs="+", metavar="FILE", help="measure nothing; rewrite the tables")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything (default %(default).0f)")
    parser.add_argument("--candidate-seconds", type=float, default=0.12, help="for each candidate and problem")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda",
                        help="cpu: tiny problems, to try the command itself")  # fmt: skip
    names = [group.text for group in problems.GROUPS]
    parser.add_argument("--group", action="append", choices=names, help="only this one; may be repeated")
    return parser.parse_args(arguments)


def _family(device: str) -> tuple[int, dict[str, Any]]:
    """Whose tables, and the machine in words."""
    described = machine.describe(device)
    return (problems.family_of(str(described["capability"])) if device == "cuda" else 90), described


def _line(group: dict[str, Any]) -> str:
    found, name = group["winner"], f"{group['op']} {group['size']}"
    if found is None:
        return f"{name}: not decided{'' if group['complete'] else ', no time for everything'}"
    default = tuple(group["problems"][0]["candidates"][0]["choice"])
    best = tuple(found["choice"])
    verdict = "stays" if best == default else f"-> {best}, {found['gain']:.2f}x as fast"
    return f"{name}: {default} {verdict} (of {found['compared']})"


def _save(results: dict[str, Any], path: Path | None) -> None:
    """After every group, so that a run that is ended early leaves what it had."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(table.results_text(results))


def measure(options: argparse.Namespace) -> int:
    """Measures, prints, saves."""
    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch.cuda sees no device")
        return SKIPPED
    begin = time.monotonic()
    family, described = _family(options.device)
    if not family:
        print(f"{described['device']} has no products of FP8: nothing to tune")
        return SKIPPED
    here = problems.GROUPS if options.device == "cpu" else problems.groups(family)
    chosen = [group for group in here if group.text in (options.group or [group.text])]
    results: dict[str, Any] = {"schema": table.SCHEMA, "measured_on": described}
    results |= {"family": family if options.device == "cuda" else 0, "seconds": 0.0, "groups": []}
    with tempfile.TemporaryDirectory() as folder:
        end = begin + options.seconds
        trials = Trials(options.device, family, Path(folder), end, options.candidate_seconds)
        for group in chosen:
            record = trials.group(group)
            results["groups"].append(record)
            results["seconds"] = round(time.monotonic() - begin, 1)
            _save(results, options.save)
            print("\n".join([_line(record), *(f"  {text}" for text in choose.problems_of(record))]), flush=True)
        if any(choose.default_failed(record) for record in results["groups"]):
            print((Path(folder) / "log").read_text(errors="replace")[-4000:])
    return _verdict(results)


def _verdict(results: dict[str, Any]) -> int:
    groups = results["groups"]
    decided = [group["winner"] for group in groups if group["winner"]]
    better = sum(found["gain"] > 1 for found in decided)
    print(f"tuned {len(decided)} of {len(groups)} classes, {better} of them faster, {results['seconds']:.0f} s")
    if any(choose.default_failed(group) for group in groups):
        return 1
    return 0 if all(group["complete"] for group in groups) else NOT_RUN


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    if options.apply:
        try:
            before = table.text(table.shipped())
            changed = table.apply(options.apply) != before
        except (OSError, ValueError) as error:
            print(error, file=sys.stderr)
            return 1
        print(f"{table.PATH.relative_to(table.ROOT)} {'changed: now run the gates' if changed else 'stays as it was'}")
        return 0
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: processes.stop.set())
    return measure(options)


if __name__ == "__main__":
    sys.exit(main())
