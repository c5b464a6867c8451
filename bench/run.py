"""Runs cases: accuracy first, then interleaved time, then memory; what comes out is plain data for JSON."""

from __future__ import annotations

import gc
import importlib
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from grpo_kernels import _dispatch

from . import clock, limits, machine, memory
from .case import Case, Gate, Inputs, Provider, Record, Row, copy_inputs
from .cuda_clock import CudaClock
from .derive import finish, rounded, summarise
from .limits import Limits
from .progress import Progress

MODULES = ("group_advantages", "token_log_probs", "grpo_loss")
SEED = 20251122


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    seconds: float = 5.0  # a case, all its providers together
    minimum_rounds: int = 5
    maximum_rounds: int = 60
    memory: bool = True
    deadline: float = math.inf  # seconds after the start: what has not begun by then is left out


FULL = Effort()
QUICK = Effort(seconds=1.5, minimum_rounds=3, memory=False)


def cases(device: str) -> list[Case]:
    """Every case of every op on this type of device."""
    return [case for name in MODULES for case in importlib.import_module(f".bench_{name}", __package__).cases(device)]


def make_inputs(case: Case, device: str, size: str) -> Inputs:
    torch.manual_seed(SEED)
    return case.make(device, size)


def _give_back_memory(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _accurate(case: Case, pristine: Inputs, rows: dict[str, Row], progress: Progress) -> list[Provider]:
    """Providers that may be timed; the rows of the others say what is wrong.

    The baseline is timed even if it misses the budget, since without it there is no ratio; so is torch.compile of it.
    """
    progress.step("accuracy")
    gate = Gate(case, pristine)
    timed = []
    for provider in case.providers:
        progress.step(f"accuracy of {provider.name}")
        problem = ""
        if provider.kind != "part":
            try:
                problem = gate.problem(provider, copy_inputs(pristine))
            except Exception as error:  # out of memory, for instance: the others can still be measured
                rows[provider.name]["error"] = clock.error_text(error)
                continue
        if problem:
            rows[provider.name]["accuracy"] = problem
        if not problem or provider.kind in ("eager", "compile"):
            timed.append(provider)
    return timed


def _runners(
    case: Case, device: str, pristine: Inputs, timed: list[Provider], rows: dict[str, Row], with_memory: bool
) -> list[clock.Runner]:
    sets = clock.input_sets(copy_inputs(pristine), device, 1 if case.clock == "host" else None)
    on_device = device == "cuda" and case.clock == "device"
    cuda_clock = CudaClock(sets, pristine) if on_device else None
    runners = []
    for provider in timed:
        try:
            if cuda_clock is None:
                runners.append(clock.wall_runner(provider, sets, pristine, device))
                continue
            if with_memory and case.memory and provider.kind != "part":
                rows[provider.name]["extra_bytes"] = memory.peak_cuda(provider, sets[0])
                clock.restore(provider, sets[:1], pristine)
            runners.append(cuda_clock.runner(provider))
        except Exception as error:
            rows[provider.name]["error"] = clock.error_text(error)
    return runners


def _measure_into(record: Record, case: Case, device: str, effort: Effort, progress: Progress) -> None:
    rows = record["rows"]
    pristine = make_inputs(case, device, "full")
    backend = _dispatch.resolve(case.op, next(t for t in pristine.values() if t.is_floating_point()))
    for row in rows.values():
        if row["kind"] == "ours":
            row["backend"] = backend
    timed = _accurate(case, pristine, rows, progress)
    _give_back_memory(device)
    progress.step("preparing")
    runners = _runners(case, device, pristine, timed, rows, effort.memory)
    clock.interleave(runners, effort.seconds, effort.minimum_rounds, effort.maximum_rounds, progress.step)
    for runner in runners:
        row = rows[runner.provider.name]
        row["clock"] = runner.clock
        if runner.note:
            row["note"] = runner.note
        if runner.error:
            row["error"] = runner.error
        else:
            row["seconds"] = runner.samples


def measure(case: Case, device: str, effort: Effort, progress: Progress | None = None) -> Record:
    """The record of one case, with samples in seconds in the row of every provider that could be timed."""
    torch._dynamo.reset()  # compiled code of the case before it, whose shapes would count against the recompile limit
    record: Record = {"op": case.op, "case": case.name, "clock": case.clock}
    if case.bytes_moved:
        record["bytes_moved"] = case.bytes_moved
    if case.operations and case.matmul_dtype:
        record["operations"] = case.operations
        record["matmul_dtype"] = limits.dtype_name(case.matmul_dtype)
    record["rows"] = {provider.name: {"kind": provider.kind} for provider in case.providers}
    try:
        _measure_into(record, case, device, effort, progress or Progress())
    except Exception as error:  # inputs that do not fit, a baseline that cannot run: the other cases still can
        record["error"] = clock.error_text(error)
    _give_back_memory(device)
    return record


def _add_cpu_memory(
    records: list[Record], chosen: Sequence[Case], late: Callable[[], bool], progress: Progress
) -> None:
    """Peak bytes above the inputs, for the cases that ask for it, until it is late."""
    asking = {(case.op, case.name) for case in chosen if case.memory}
    jobs: dict[tuple[str, str], list[str]] = {}
    for record in records:
        for provider, row in record["rows"].items():
            if (record["op"], record["case"]) in asking and "median_us" in row and row["kind"] != "part":
                jobs.setdefault((record["op"], provider), []).append(record["case"])
    if jobs:
        progress.note("peak memory, in fresh processes")
    for (op, provider), names in jobs.items():
        if late():
            break
        progress.step(f"memory of {provider}")
        peaks, problem = memory.peaks_in_new_process(op, provider, names, "full")
        if problem:
            progress.note(f"no memory figures for {op}, {provider}: {problem}")
        for record in records:
            if record["op"] == op and record["case"] in peaks:
                record["rows"][provider]["extra_bytes"] = peaks[record["case"]]


def choose(device: str, ops: Sequence[str] | None, quick: bool) -> list[Case]:
    """The cases of these ops (None: all)."""
    return [case for case in cases(device) if (ops is None or case.op in ops) and (case.quick or not quick)]


class _Run:
    """Everything so far, and the file's content that can be made of it."""

    def __init__(self, device: str, chosen: Sequence[Case]) -> None:
        self.begin = time.time()
        self.chosen = chosen
        self.description = machine.describe(device)
        self.limits = Limits(device, limits.wanted_dtypes(case.matmul_dtype for case in chosen))
        self.records: dict[tuple[str, str], Record] = {}
        self.skipped: list[str] = []

    def elapsed(self) -> float:
        return time.time() - self.begin

    def measure_limits(self, progress: Progress) -> None:
        try:
            self.limits.measure()
        except RuntimeError as error:  # a GPU that a kernel has brought down: what was measured before it still counts
            progress.note(f"limits not measured again: {clock.error_text(error)}")

    def results(self) -> dict[str, Any]:
        ordered = [case for case in self.chosen if (case.op, case.name) in self.records]
        for case in ordered:
            finish(self.records[case.op, case.name], case, self.limits)
        described = dict(self.description)
        described["copy_gigabytes_per_second"] = rounded(self.limits.copy * 1e-9)
        if self.limits.matmul:
            described["matmul_teraflops"] = {name: rounded(rate * 1e-12) for name, rate in self.limits.matmul.items()}
            described["tf32"] = limits.tf32_is_on()
        described["load_average"] = round(os.getloadavg()[1], 1)  # above the number of threads: others were at work too
        return {
            "machine": described,
            "seconds": round(self.elapsed()),
            "skipped": self.skipped,
            "cases": [self.records[case.op, case.name] for case in ordered],
        }


def _urgency(case: Case) -> int:
    """The order under a deadline: the short list, so that every op has its figures, and then what takes no time."""
    if case.quick:
        return 0
    return 1 if case.clock == "host" else 2


def run(
    device: str,
    effort: Effort,
    chosen: Sequence[Case],
    progress: Progress,
    keep: Callable[[dict[str, Any]], None] = lambda results: None,
) -> dict[str, Any]:
    """Everything: the content of a file of results. `keep` gets what there is after each case."""
    state = _Run(device, chosen)
    progress.begin(len(chosen))
    state.limits.measure()
    for case in chosen if math.isinf(effort.deadline) else sorted(chosen, key=_urgency):
        if state.elapsed() > effort.deadline:
            state.skipped.append(f"{case.op}: {case.name}")
            continue
        progress.case(f"{case.op}: {case.name}")
        record = measure(case, device, effort, progress)
        summarise(record)
        state.records[case.op, case.name] = record
        if case.memory:  # between the large cases: on a shared machine the limit moves during the run
            state.measure_limits(progress)
        keep(state.results())
    if state.limits.measurements < 2:
        state.measure_limits(progress)
    if effort.memory and device == "cpu":
        _add_cpu_memory(list(state.records.values()), chosen, lambda: state.elapsed() > effort.deadline, progress)
    return state.results()
