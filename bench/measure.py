"""Measures one case: accuracy first, then interleaved time, on a GPU memory as well."""

from __future__ import annotations

import gc
import math
from dataclasses import dataclass

import torch

from grpo_kernels import _dispatch

from . import clock, memory
from .case import Case, Gate, Inputs, Provider, Record, copy_inputs
from .cuda_clock import CudaClock
from .limits import dtype_name
from .progress import Progress
from .target import Row

SEED = 20251122


_HOST_ROUNDS = 11  # that count as one: of microseconds, and as short as an interruption


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    seconds: float = 5.0  # a case, all its providers together
    minimum_rounds: int = 5
    maximum_rounds: int = 60
    memory: bool = True
    deadline: float = math.inf  # seconds after the start: what has not begun by then is left out
    first: tuple[str, ...] = ()  # under a deadline, of the short list, these words' cases come first


def make_inputs(case: Case, device: str, size: str) -> Inputs:
    torch.manual_seed(SEED)
    return case.make(device, size)


def _give_back_memory(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _accurate(case: Case, pristine: Inputs, rows: dict[str, Row], progress: Progress) -> list[Provider]:
    """Providers that may be timed; the rows of the others say what is wrong.

    The baseline is timed even if it misses the budget, since without it there is no ratio; so are torch.compile of it
    and peers, many of which round logits to bf16 as eager PyTorch does.
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
        if not problem or provider.kind != "ours":
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
                rows[provider.name]["extra_bytes"] = memory.peak_cuda(case, provider, sets[0])
                clock.restore(provider, sets[:1], pristine)
            runners.append(cuda_clock.runner(provider))
        except Exception as error:
            rows[provider.name]["error"] = clock.error_text(error)
    return runners


def _measure_into(record: Record, case: Case, device: str, effort: Effort, progress: Progress) -> None:
    rows = record["rows"]
    pristine = make_inputs(case, device, "full")
    deciding = [t for t in pristine.values() if t.is_floating_point()] or list(pristine.values())
    backend = _dispatch.resolve(case.op, deciding[0])
    for row in rows.values():
        if row["kind"] == "ours":
            row["backend"] = backend
    timed = _accurate(case, pristine, rows, progress)
    _give_back_memory(device)
    progress.step("preparing")
    runners = _runners(case, device, pristine, timed, rows, effort.memory)
    times = _HOST_ROUNDS if case.clock == "host" else 1
    rounds = (times * effort.minimum_rounds, times * effort.maximum_rounds)
    clock.interleave(runners, effort.seconds, *rounds, progress.step)
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
        record["matmul_dtype"] = dtype_name(case.matmul_dtype)
    if case.absent:
        record["absent"] = list(case.absent)
    record["rows"] = {provider.name: {"kind": provider.kind} for provider in case.providers}
    try:
        _measure_into(record, case, device, effort, progress or Progress())
    except Exception as error:  # inputs that do not fit, a baseline that cannot run: the other cases still can
        record["error"] = clock.error_text(error)
    _give_back_memory(device)
    return record
