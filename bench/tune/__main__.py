"""The command; see bench/tune/__init__.py."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import bench.tune as package
from bench import machine
from bench.gates import fingerprint
from bench.gpu_check import processes
from bench.gpu_check.phases import NOT_RUN, SKIPPED
from bench.tune import choose, problems, table, tiles
from bench.tune.candidates import candidates
from bench.tune.trials import Trials

OPS = ("grouped_gemm", "linear_log_probs")
SECONDS = 600.0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tune", description=package.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", action="append", choices=OPS, help="only this one; may be repeated")
    parser.add_argument("--save", type=Path, metavar="FILE", help="where the measurements go; otherwise only printed")
    parser.add_argument("--resume", action="store_true",
                        help="keep what FILE has of this machine, these versions and this code")  # fmt: skip
    parser.add_argument("--compile", type=int, choices=(80, 90), help="measure nothing; compile every candidate")
    parser.add_argument("--apply", type=Path, nargs="+", metavar="FILE", help="measure nothing; rewrite the tables")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything (default %(default).0f)")
    parser.add_argument("--candidate-seconds", type=float, default=0.12, help="for each candidate and problem")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda",
                        help="cpu: tiny problems, to try the command itself")  # fmt: skip
    names = [group.text for group in problems.GROUPS]
    parser.add_argument("--group", action="append", choices=names, help="only this one; may be repeated")
    options = parser.parse_args(arguments)
    if options.resume and options.save is None:
        parser.error("--resume: needs --save FILE")
    return options


def _architecture(described: dict[str, Any], device: str) -> int:
    """10 * major + minor of the GPU; a rehearsal plays sm_90."""
    if device == "cpu":
        return 90
    major, minor = map(int, str(described["capability"]).split("."))
    return 10 * major + minor


def _chosen(options: argparse.Namespace, architecture: int) -> list[problems.Group]:
    return [
        group
        for group in problems.groups(architecture)
        if group.text in (options.group or [group.text]) and group.package in (options.op or OPS)
    ]


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


def _kept(
    options: argparse.Namespace, results: dict[str, Any], chosen: list[problems.Group], architecture: int
) -> dict[str, dict[str, Any]]:
    """By their names the groups that an earlier run measured to the end: the same candidates, machine and code."""
    if not (options.resume and options.save.exists()):
        return {}
    try:
        before = json.loads(options.save.read_text())
    except ValueError:
        return {}
    if any(before.get(name) != results[name] for name in ("schema", "architecture", "measured_on", "sources")):
        return {}
    tried = {
        group.text: [list(choice) for choice in candidates(group.op, architecture, group.size)] for group in chosen
    }
    kept = {}
    for group in before["groups"]:
        name = f"{group['op']} {group['size']}"
        choices = [[line["choice"] for line in problem["candidates"]] for problem in group["problems"]]
        if group["complete"] and group["winner"] is not None and all(found == tried.get(name) for found in choices):
            kept[name] = group
    return kept


def measure(options: argparse.Namespace) -> int:
    """Measures, prints, saves."""
    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch.cuda sees no device")
        return SKIPPED
    begin, described = time.monotonic(), machine.describe(options.device)
    architecture = _architecture(described, options.device)
    chosen = _chosen(options, architecture)
    if not chosen:
        print(f"{described['device']} has nothing to tune")
        return SKIPPED
    sources = {op: fingerprint.of(op, "Triton") for op in OPS}
    results: dict[str, Any] = {"schema": table.SCHEMA, "measured_on": described, "sources": sources}
    results |= {"architecture": architecture if options.device == "cuda" else 0, "seconds": 0.0, "groups": []}
    kept = _kept(options, results, chosen, architecture)
    with tempfile.TemporaryDirectory() as folder:
        trials = Trials(
            options.device, architecture, Path(folder), begin + options.seconds, options.candidate_seconds
        )  # fmt: skip
        for index, group in enumerate(chosen):
            record = kept.get(group.text) or trials.group(group)
            results["groups"].append(record)
            results["seconds"] = round(time.monotonic() - begin, 1)
            later = [kept[other.text] for other in chosen[index + 1 :] if other.text in kept]
            _save({**results, "groups": results["groups"] + later}, options.save)
            print("\n".join([_line(record), *(f"  {text}" for text in choose.problems_of(record))]), flush=True)
        if any(choose.default_failed(record) for record in results["groups"]):
            print((Path(folder) / "log").read_text(errors="replace")[-4000:])
    return _verdict(results)


def _compile(options: argparse.Namespace) -> int:
    """Every candidate of the chosen groups for an architecture, without a GPU."""
    from bench.tune import compiled

    chosen = [(group.op, group.size) for group in _chosen(options, options.compile) if group.op in tiles.OPS]
    failed = compiled.report(options.compile, chosen)
    print(f"{failed} candidates of {len(chosen)} classes break a limit")
    return 1 if failed else 0


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
            changed = table.apply(options.apply)
        except (OSError, ValueError) as error:
            print(error, file=sys.stderr)
            return 1
        for path in changed:
            print(f"{path} changed: now run the gates")
        if not changed:
            print("the tables stay as they were")
        return 0
    if options.compile:
        return _compile(options)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: processes.stop.set())
    return measure(options)


if __name__ == "__main__":
    sys.exit(main())
