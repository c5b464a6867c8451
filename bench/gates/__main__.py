"""`make gates`: compiles every shipped kernel for sm_80, sm_90 and sm_100, and fails if one breaks its limits.

A complete run of an op writes its rows to bench/results/gates.json, from which docs/kernels.md is made.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.gates import cuda_kernels, ops, report, sweep, triton_kernels
from bench.gates.gate import ARCHITECTURES

ROOT = Path(__file__).parents[2]
COMPILERS = ("nvcc", "triton")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gates", description=__doc__)
    parser.add_argument("--op", action="append", choices=list(ops.modules()), help="only this op; may be repeated")
    parser.add_argument("--arch", action="append", type=int, choices=ARCHITECTURES, help="only this architecture")
    parser.add_argument("--compiler", choices=COMPILERS, help="only these kernels")
    parser.add_argument("--quick", action="store_true", help="a few specialisations of each Triton kernel")
    parser.add_argument("--sample", type=int, default=1, metavar="N",
                        help="one in N of the Triton kernels, others whenever the code of an op changes")  # fmt: skip
    parser.add_argument("--beside", type=Path, action="append", default=[], metavar="FOLDER",
                        help="another release of Triton (pip install --target FOLDER), in the same table")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--json", type=Path, help="write the rows of this run here, and nowhere else")
    arguments = parser.parse_args()
    if arguments.sample < 1:
        parser.error(f"--sample: must be 1 or more, got {arguments.sample}")
    for folder in arguments.beside:
        if not (folder / "triton" / "__init__.py").is_file():
            parser.error(f"--beside: there is no Triton in {folder}")
    return arguments


def _compilers(arguments: argparse.Namespace) -> list[str]:
    """The compilers that are here; says which are not."""
    asked = [arguments.compiler] if arguments.compiler else list(COMPILERS)
    problems = {"triton": triton_kernels.problem(), "nvcc": cuda_kernels.problem()}
    for name in asked:
        if problems[name]:
            print(f"no {name} kernels: {problems[name]}", file=sys.stderr)
    return [name for name in asked if not problems[name]]


def _rows_of_other_triton(folder: Path, arguments: argparse.Namespace) -> list[report.Row]:
    """The Triton rows of a process that imports the release in `folder`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder.resolve()), str(ROOT)])}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "rows.json"
        command = [sys.executable, "-m", "bench.gates", "--compiler", "triton", "--json", str(path)]
        command += ["--jobs", str(arguments.jobs), f"--sample={arguments.sample}"]
        command += ["--quick"] if arguments.quick else []
        command += [f"--op={op}" for op in arguments.op or ()] + [f"--arch={arch}" for arch in arguments.arch or ()]
        status = subprocess.run(command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL).returncode
        if not path.is_file():
            raise SystemExit(f"the gates with the Triton of {folder} ended with status {status}")
        rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
        return rows


def _keep(rows: list[report.Row], arguments: argparse.Namespace, compilers: list[str]) -> Path | None:
    """Writes the rows where they belong: into the record only if they are complete for their op and compiler."""
    rows = report.stamped(rows)
    asked: Path | None = arguments.json
    if asked is not None:
        report.save(rows, asked)
        return asked
    if arguments.quick or arguments.arch or arguments.sample > 1:
        return None
    # Rows of compilers that are no longer used go when everything was compiled anew.
    everything = arguments.beside and not arguments.op and len(compilers) == len(COMPILERS)
    report.save(
        report.order(rows) if everything else report.merged(report.load(report.PATH)["rows"], rows), report.PATH
    )
    return report.PATH


def main() -> int:
    arguments = _arguments()
    begin = time.time()
    compilers = _compilers(arguments)
    chosen = arguments.op or list(ops.modules())
    architectures = arguments.arch or ARCHITECTURES
    rows = sweep.run(chosen, architectures, arguments.jobs, arguments.quick, compilers, arguments.sample)
    for folder in arguments.beside:
        rows += _rows_of_other_triton(folder, arguments)
    if not rows:
        print("nothing was compiled", file=sys.stderr)
        return 1
    report.table(rows).show()
    for row in rows:
        for text in row["failures"]:
            print(f"{report.kernel_name(row)}, {row['compiler']}, sm_{row['arch']}: {text}")
    count = sum(row["specialisations"] for row in rows)
    failed = sum(len(row["failures"]) for row in rows)
    print(f"{count} kernels compiled, {failed} limits broken; {time.time() - begin:.0f} s")
    if path := _keep(rows, arguments, compilers):
        print(f"written: {path}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
