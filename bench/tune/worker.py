"""Measures the candidates of one group: `python -m bench.tune.worker REQUEST.json`.

A process of its own: kernels whose groups of warps wait for each other for ever cannot be interrupted, and after an
illegal address nothing else runs. Every line that it writes stands for itself, so that what it had is not lost.
"""

from __future__ import annotations

import faulthandler
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import clock
from bench.case import Inputs, Provider
from bench.cuda_clock import CudaClock
from bench.tune import problems
from bench.tune.candidates import AnyChoice, choice_of
from bench.tune.problems import Group, Problem

SEED = 20261123
MINIMUM_ROUNDS, MAXIMUM_ROUNDS = 5, 40
BROKEN = 3
"""Exit status after an error that leaves the device unusable."""

Emit = Callable[[dict[str, Any]], None]
Judge = Callable[[AnyChoice], dict[str, Any]]
MakeRunner = Callable[[Provider], clock.Runner]


class Request(NamedTuple):
    """What to measure.

    Attributes:
        jobs: (problem, candidate) that are still to be done.
        seconds: of measuring a candidate; `limit`: until it counts as one that hangs, compilation included.
        output: where lines are added.
    """

    group: int
    choices: list[AnyChoice]
    jobs: list[tuple[int, int]]
    device: str
    seconds: float
    limit: float
    output: str

    @classmethod
    def read(cls, path: Path) -> Request:
        fields = json.loads(path.read_text())
        op = problems.GROUPS[fields["group"]].op
        fields["choices"] = [choice_of(op, choice) for choice in fields["choices"]]
        return cls(**fields)


def _median(runner: clock.Runner) -> float:
    return statistics.median(runner.samples) * 1e6


def candidate(
    group: Group, choice: AnyChoice, judge: Judge, make_runner: MakeRunner, base: clock.Runner, seconds: float
) -> dict[str, Any]:  # fmt: skip
    """Its microseconds and, in the same rounds, the default's; without them, where its result may not be used."""
    verdict = judge(choice)
    if not verdict["held"]:
        return verdict
    runner = make_runner(Provider(str(tuple(choice)), lambda given: problems.run(group, given, choice), "ours"))
    base.samples.clear()
    clock.interleave([base, runner], seconds, MINIMUM_ROUNDS, MAXIMUM_ROUNDS, lambda text: None)
    if runner.error or base.error:
        raise RuntimeError(runner.error or base.error)
    times = {"microseconds": _median(runner), "default_microseconds": _median(base)}
    return {**verdict, **times, "rounds": len(runner.samples), "clock": runner.clock}


def _runners(device: str, inputs: Inputs) -> MakeRunner:
    sets = clock.input_sets(inputs, device, 2 if device == "cuda" else 1)
    if device == "cuda":
        return CudaClock(sets, inputs).runner
    return lambda provider: clock.wall_runner(provider, sets, inputs, device)


def _check_device(device: str) -> None:
    """Ends the process where no other candidate could run any more."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        sys.exit(BROKEN)


def measure(request: Request, group: Group, which: int, problem: Problem, emit: Emit) -> None:
    """Everything that is to be done of one problem."""
    torch.manual_seed(SEED)
    emit({"problem": which, "begun": True})
    faulthandler.dump_traceback_later(request.limit, exit=True)
    inputs = problems.make(group, problem, request.device)
    first = request.choices[0]
    judge = problems.judge(group, inputs, first)
    make_runner = _runners(request.device, inputs)
    base = make_runner(Provider("default", lambda given: problems.run(group, given, first), "ours"))
    for index in (choice for number, choice in request.jobs if number == which):
        job = {"problem": which, "candidate": index}
        emit({**job, "begun": True})
        faulthandler.dump_traceback_later(request.limit, exit=True)
        try:
            emit({**job, **candidate(group, request.choices[index], judge, make_runner, base, request.seconds)})
        except Exception as error:
            emit({**job, "error": clock.error_text(error)})
            _check_device(request.device)
    faulthandler.cancel_dump_traceback_later()


def main() -> int:
    request = Request.read(Path(sys.argv[1]))
    group = problems.GROUPS[request.group]
    with Path(request.output).open("a") as file:

        def emit(line: dict[str, Any]) -> None:
            print(json.dumps(line), file=file, flush=True)

        for which in dict.fromkeys(number for number, _ in request.jobs):
            try:
                measure(request, group, which, group.problems[which].on(request.device), emit)
            except Exception as error:
                emit({"problem": which, "error": clock.error_text(error)})
                return BROKEN
            if request.device == "cuda":
                torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
