"""`python -m bench`: measures every op on this machine, prints the table and writes bench/results/<machine>.json."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path

from bench import machine, report


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--op", action="append", help="only this op; may be given several times")
    parser.add_argument("--device", help="cpu or cuda; the GPU if there is one")
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds, no memory figures, no file")
    parser.add_argument("--seconds", type=float, help="time for each case (default 5)")
    parser.add_argument("--deadline", type=float, help="seconds after which no further case is begun")
    parser.add_argument("--output", type=Path, help="the file of results, instead of bench/results/<machine>.json")
    return parser.parse_args()


def main() -> int:
    arguments = _arguments()
    device = arguments.device or machine.default_device()
    if device == "cpu" and sys.platform == "linux" and not machine.pages_are_recycled():
        # The allocator reads its settings when a process starts.
        command = [sys.executable, "-m", "bench", *sys.argv[1:]]
        sys.stdout.flush()
        os.execve(sys.executable, command, machine.environment(machine.RECYCLING))
    from bench import run

    if unknown := set(arguments.op or ()) - set(run.MODULES):
        print(f"bench: --op must be one of {', '.join(run.MODULES)}, got {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    effort = run.QUICK if arguments.quick else run.FULL
    if arguments.seconds:
        effort = dataclasses.replace(effort, seconds=arguments.seconds)
    if arguments.deadline:
        effort = dataclasses.replace(effort, deadline=arguments.deadline)
    results = run.run(device, effort, arguments.op, arguments.quick, lambda text: print(text, file=sys.stderr))
    report.show(results)
    path = arguments.output
    if path is None and not arguments.quick and arguments.op is None:  # only a complete run replaces the record
        path = Path(__file__).parent / "results" / f"{machine.slug(device)}.json"
    if path is not None:
        report.save(results, path)
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
