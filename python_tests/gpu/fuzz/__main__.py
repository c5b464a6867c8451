"""Problems of one kind until the time is over. The last line that was printed names the one that hung or crashed."""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from python_tests.gpu.devices import run_op, synchronize
from python_tests.gpu.fuzz.checks import CHECKS
from python_tests.gpu.fuzz.compare import same_bits
from python_tests.gpu.fuzz.experts import experts
from python_tests.gpu.fuzz.problems import PROBLEMS, Dice, OpCall

PATIENCE = 60.0  # seconds that a problem may take; most of it is for compiling


def _shown(value: Any) -> str:
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}" if isinstance(value, Tensor) else str(value)


def _of_op(call: OpCall) -> tuple[str, Callable[[str], None]]:
    def check(device: str) -> None:
        found, again = (run_op(call.op, call.arguments, device) for _ in range(2))
        for index, (a, b) in enumerate(zip(found, again, strict=True)):
            same_bits(f"result {index} of equal calls", a, b)
        CHECKS[call.op](call.arguments, found)

    return f"{call.op}({', '.join(map(_shown, call.arguments))})", check


def problem(kind: str, seed: int) -> tuple[str, Callable[[str], None]]:
    """What it is, and the check of it on a device."""
    torch.manual_seed(seed)
    dice = Dice(seed)
    return experts(dice) if kind == "experts" else _of_op(PROBLEMS[kind](dice))


KINDS = (*PROBLEMS, "experts")


def run(kind: str, device: str, seconds: float, most: int, first: int, patience: float | None = None) -> int:
    """Exit status. A problem that takes longer than `patience` ends the process."""
    end, count = time.monotonic() + seconds, 0
    while count == 0 or (time.monotonic() < end and count < most):
        seed = first + count
        name, check = problem(kind, seed)
        print(f"--op {kind} --seed {seed}: {name}", flush=True)
        if patience is not None:
            faulthandler.dump_traceback_later(patience, exit=True)
        try:
            check(device)
            synchronize(device)
        except AssertionError as error:
            print(f"wrong: {error}")
            return 1
        if patience is not None:
            faulthandler.cancel_dump_traceback_later()
        count += 1
    print(f"{count} problems of {kind} are right on {device}")
    return 0


def _started() -> float:
    """When this process began, in seconds since the machine did: importing counts."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m python_tests.gpu.fuzz", description=__doc__)
    parser.add_argument("--op", choices=KINDS, required=True, help="the kind of problem")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=10.0, help="since the process began; one problem in any case")
    parser.add_argument("--problems", type=int, default=10**9, help="at most so many")
    parser.add_argument("--seed", type=int, default=0, help="of the first problem; the next one has the next")
    options = parser.parse_args(arguments)
    left = options.seconds - (time.clock_gettime(time.CLOCK_BOOTTIME) - _started())
    return run(options.op, options.device, left, options.problems, options.seed, PATIENCE)


if __name__ == "__main__":
    sys.exit(main())
