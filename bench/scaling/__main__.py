"""`python -m bench.scaling`: how time and peak memory grow, against eager PyTorch, along one axis at a time.

The record is bench/results/scaling-<machine>.json; the pictures, one log-log panel a sweep, go to docs/images.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from bench import machine, progress, row_file
from bench.scaling import measure, ranks, sweeps

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
RANKS = "ranks"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__)
    names = (*sweeps.OPS, RANKS)
    parser.add_argument(
        "--op", action="append", choices=names, help="this one alone (repeatable); saved if --save says so"
    )
    parser.add_argument("--save", type=Path, metavar="FILE", help="instead of bench/results/scaling-<machine>.json")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="where pictures go (default: docs/images)")
    parser.add_argument(
        "--results", type=Path, metavar="FILE", help="draw the pictures of this record; measure nothing"
    )
    arguments = parser.parse_args()
    if arguments.results:
        _draw(json.loads(arguments.results.read_text()), arguments.plot or ROOT / "docs" / "images")
        return 0
    machine.recycle_pages("cpu", [sys.executable, "-m", "bench.scaling", *sys.argv[1:]])
    chosen = arguments.op or names
    with progress.shown() as display:
        found = sweeps.of([op for op in chosen if op != RANKS])
        results = measure.run(found, ranks.SWEEPS if RANKS in chosen else (), display)
    path = arguments.save or (None if arguments.op else RESULTS / f"scaling-{machine.slug('cpu')}.json")
    if path is not None:
        row_file.save(results, path)
        print(f"written: {path}; {results['seconds']} s")
    if arguments.plot or not arguments.op:
        _draw(results, arguments.plot or ROOT / "docs" / "images")
    return 0


def _draw(results: measure.Results, folder: Path) -> None:
    from bench.scaling import plot

    for path in plot.draw(results, folder):
        print(f"drawn: {path}")


if __name__ == "__main__":
    sys.exit(main())
