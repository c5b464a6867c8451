"""Measures every op against eager PyTorch, torch.compile and peers on this machine: accuracy first, then time,
bandwidth, rate and memory, and what percentage that is of what the machine can do.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import grpo_kernels

_INSTALLED = "grpo_kernels._bench"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options; bench/command.py says what they do."""
    what = parser.add_argument_group("what to measure")
    what.add_argument("--op", action="append", help="only this op; may be given several times")
    what.add_argument("--device", choices=("cpu", "cuda"), help="the GPU if there is one")
    what.add_argument("--quick", action="store_true", help="fewer cases and rounds, no memory figures")
    what.add_argument("--seconds", type=float, help="time for each case (default 5)")
    what.add_argument("--deadline", type=float, help="seconds after which no further case is begun")
    what.add_argument(
        "--first", action="append", metavar="WORD", help="under a deadline: those of --quick with it in their names"
    )
    what.add_argument("--list", action="store_true", help="name the cases and their providers, measure nothing")
    what.add_argument("--results", type=Path, metavar="FILE", help="take these saved results instead of measuring")
    use = parser.add_argument_group("what to do with the results, besides the tables")
    use.add_argument(
        "--save",
        "--output",
        type=Path,
        metavar="PATH",
        help="write them to this JSON file, or to <machine>.json in this folder, anew after every case: a run that is "
        "ended early leaves what it had",
    )
    use.add_argument(
        "--renew", action="store_true", help="with --save: cases in the file that are not measured now stay there"
    )
    use.add_argument("--plot", type=Path, metavar="FOLDER", help="draw speed-ups and rooflines as PNG (matplotlib)")
    use.add_argument("--compare", type=Path, metavar="FILE", help="show old, new and ratio of earlier results")
    use.add_argument(
        "--fail-above",
        type=float,
        metavar="RATIO",
        help="with --compare: exit status 1 if a row of ours got slower by more than this, such as 1.2: in its median, "
        "its minimum, and against eager PyTorch",
    )


def _harness() -> Any:
    """The benchmarks: inside an installed wheel, or the folder beside the package in a checkout; None if neither."""
    if importlib.util.find_spec(_INSTALLED) is not None:
        return importlib.import_module(f"{_INSTALLED}.command")
    root = Path(grpo_kernels.__file__).resolve().parents[1]
    if not (root / "bench" / "command.py").is_file():
        return None
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return importlib.import_module("bench.command")


def run(arguments: argparse.Namespace) -> int:
    """Runs the benchmarks; the exit status is 2 where this installation has none."""
    harness = _harness()
    if harness is None:
        package = Path(grpo_kernels.__file__).parent
        print(
            f"grpo-kernels bench: this installation has no benchmarks: neither {_INSTALLED} in {package}, "
            f"nor a folder bench beside it",
            file=sys.stderr,
        )
        return 2
    status: int = harness.run(arguments)
    return status
