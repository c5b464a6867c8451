"""Runs one Python command for every op, each in a process of its own: one that hangs or crashes costs no other.

    python -m bench.gpu_check.each_op --ops A,B [--workers N] [--seconds S] [--json FILE] -- ARGUMENTS

Adds `--op NAME` to the arguments, and with --json a file of its own each; their contents end up in FILE, by op.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from bench.gpu_check import processes
from bench.gpu_check.settings import ROOT, cores

_LINES = 8  # of the output of an op that failed, once more at the end


def _environment(workers: int) -> dict[str, str]:
    """With a share of the cores for each."""
    return {"OMP_NUM_THREADS": str(max(1, cores() // workers)), **os.environ}


def _one(op: str, arguments: argparse.Namespace, folder: Path, end: float) -> tuple[processes.Result, str]:
    command = [sys.executable, *arguments.command, "--op", op]
    if arguments.json:
        command += ["--json", str(folder / f"{op}.json")]
    log = folder / f"{op}.log"
    environment = _environment(arguments.workers)
    result = processes.run(command, max(end - time.monotonic(), 1.0), log, environment, ROOT, session=False)
    return result, log.read_text(errors="replace").strip()


def _problem(result: processes.Result) -> str:
    if result.stopped:
        return result.stopped
    return "" if result.status == 0 else f"status {result.status}"


def _end(output: str) -> str:
    return "\n".join(output.splitlines()[-_LINES:])


def _merge(folder: Path, ops: list[str], target: Path) -> None:
    merged = {}
    for op in ops:
        try:
            merged[op] = json.loads((folder / f"{op}.json").read_text())
        except (OSError, ValueError):
            merged[op] = None
    target.write_text(json.dumps(merged))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check.each_op", description=__doc__)
    parser.add_argument("--ops", required=True, help="names, separated by commas")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3600.0, help="for everything")
    parser.add_argument("--json", type=Path)
    parser.add_argument("command", nargs="+", help="arguments of Python, after --")
    arguments = parser.parse_args()
    ops = arguments.ops.split(",")
    begin = time.monotonic()
    failed, last_words = [], ""
    with tempfile.TemporaryDirectory() as name, concurrent.futures.ThreadPoolExecutor(arguments.workers) as pool:
        folder = Path(name)
        jobs = {op: pool.submit(_one, op, arguments, folder, begin + arguments.seconds) for op in ops}
        for op, job in jobs.items():
            result, output = job.result()
            problem = _problem(result)
            if problem:
                failed.append(f"{op} ({problem})")
                last_words += f"--- the end of {op}:\n{_end(output)}\n"
            print(f"--- {op}: {problem or 'right'}, {result.seconds:.0f} s\n{output}", flush=True)
        if arguments.json:
            _merge(folder, ops, arguments.json)
    wrong = f"; failed: {', '.join(failed)}" if failed else ""
    print(f"{last_words}{len(ops) - len(failed)} of {len(ops)} ops right in {time.monotonic() - begin:.0f} s{wrong}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
