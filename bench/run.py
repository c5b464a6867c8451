"""Runs cases: accuracy first, then interleaved time, then memory; what comes out is plain data for JSON."""

from __future__ import annotations

import importlib
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench import clock, machine, memory
from bench.case import Case, Gate, Inputs, Provider, Row, copy_inputs
from grpo_kernels import _dispatch

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
    return [case for name in MODULES for case in importlib.import_module(f"bench.bench_{name}").cases(device)]


def make_inputs(case: Case, device: str, size: str) -> Inputs:
    torch.manual_seed(SEED)
    return case.make(device, size)


def accurate_providers(case: Case, pristine: Inputs) -> tuple[list[Provider], dict[str, str]]:
    """Providers that may be timed, and what is wrong with the others.

    The baseline is timed in any case, since without it there is no ratio, and so is torch.compile of it.
    """
    gate = Gate(case, pristine)
    timed, problems = [], {}
    for provider in case.providers:
        if provider.kind == "part":
            timed.append(provider)
            continue
        try:
            problem = gate.problem(provider, copy_inputs(pristine))
        except Exception as error:  # a peer that cannot run is reported; it does not end the run
            if provider.kind in ("ours", "eager"):
                raise
            problems[provider.name] = f"failed: {type(error).__name__}: {str(error)[:200]}"
            continue
        if problem:
            problems[provider.name] = problem
        if not problem or provider.kind in ("eager", "compile"):
            timed.append(provider)
    return timed, problems


def measure(case: Case, device: str, effort: Effort) -> dict[str, Any]:
    """The record of one case: a row per provider, and the targets."""
    torch._dynamo.reset()  # compiled code of the case before it, whose shapes would count against the recompile limit
    pristine = make_inputs(case, device, "full")
    timed, problems = accurate_providers(case, pristine)
    sets = clock.input_sets(copy_inputs(pristine), device, 1 if case.clock == "host" else None)
    runners = [clock.runner(provider, sets, pristine, device, case.clock) for provider in timed]
    samples = clock.interleave(runners, effort.seconds, effort.minimum_rounds, effort.maximum_rounds)
    rows: dict[str, Row] = {}
    backend = _dispatch.resolve(case.op, next(t for t in pristine.values() if t.is_floating_point()))
    for provider in case.providers:
        rows[provider.name] = {"kind": provider.kind}
        if provider.kind == "ours":
            rows[provider.name]["backend"] = backend
        if provider.name in problems:
            rows[provider.name]["accuracy"] = problems[provider.name]
    for runner, values in zip(runners, samples, strict=True):
        row = rows[runner.provider.name]
        row["seconds"] = values
        row["clock"] = runner.clock
    del runners, sets
    if device == "cuda":
        torch.cuda.empty_cache()
    return {"op": case.op, "case": case.name, "rows": rows}


def add_memory(records: list[dict[str, Any]], device: str, late: Callable[[], bool] = lambda: False) -> None:
    """Peak bytes above the inputs, for the cases that ask for it, until it is late."""
    chosen = {(case.op, case.name): case for case in cases(device) if case.memory}
    jobs: dict[tuple[str, str], list[str]] = {}
    for record in records:
        case = chosen.get((record["op"], record["case"]))
        for provider, row in record["rows"].items():
            if case is None or "seconds" not in row or row["kind"] == "part" or late():
                continue
            if device == "cuda":
                torch._dynamo.reset()
                row["extra_bytes"] = memory.peak_cuda(case, provider, "full")
            else:
                jobs.setdefault((record["op"], provider), []).append(record["case"])
    for (op, provider), names in jobs.items():
        if late():
            break
        peaks = memory.peaks_in_new_process(op, provider, names, "full")
        for record in records:
            if record["op"] == op and record["case"] in peaks:
                record["rows"][provider]["extra_bytes"] = peaks[record["case"]]


def finish(records: list[dict[str, Any]], device: str, bandwidth: float) -> None:
    """Derives what the table shows from the samples, and judges the targets."""
    by_name = {(case.op, case.name): case for case in cases(device)}
    for record in records:
        case = by_name[record["op"], record["case"]]
        rows: dict[str, Row] = record["rows"]
        for row in rows.values():
            if "seconds" in row:
                _derive(row, case, bandwidth)
        baseline = rows[case.eager.name]
        for row in rows.values():
            if "median_us" in row:
                row["speedup"] = _rounded(baseline["median_us"] / row["median_us"])
        record["targets"] = []
        for target in case.targets:
            value = target.value(rows)
            record["targets"].append(
                {
                    "target": target.text,
                    "measured": None if value is None else _rounded(value),
                    "met": None if value is None else target.met(value),
                }
            )


def _derive(row: Row, case: Case, bandwidth: float) -> None:
    seconds = row.pop("seconds")
    row["median_us"] = _rounded(statistics.median(seconds) * 1e6)
    row["min_us"] = _rounded(min(seconds) * 1e6)
    row["rounds"] = len(seconds)
    if case.bytes_moved and row["kind"] != "part":
        rate = case.bytes_moved / statistics.median(seconds)
        row["gigabytes_per_second"] = _rounded(rate * 1e-9)
        row["percent_of_copy"] = _rounded(100 * rate / bandwidth)
    if "extra_bytes" in row and case.memory:
        row["extra_memory_ratio"] = round(row["extra_bytes"] / case.memory, 3)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def run(device: str, effort: Effort, ops: list[str] | None, quick: bool, progress: Any = print) -> dict[str, Any]:
    """Everything: the content of a file of results."""
    begin = time.time()
    description = machine.describe(device)
    bandwidths = [machine.copy_bandwidth(device)]
    chosen = [case for case in cases(device) if (ops is None or case.op in ops) and (case.quick or not quick)]
    records = []
    skipped = []
    for index, case in enumerate(chosen):
        if time.time() - begin > effort.deadline:
            skipped.append(f"{case.op}: {case.name}")
            continue
        progress(f"[{index + 1}/{len(chosen)}] {case.op}: {case.name}")
        records.append(measure(case, device, effort))
        if case.memory:  # between the large cases: on a shared machine the limit moves during the run
            bandwidths.append(machine.copy_bandwidth(device))
    if effort.memory:
        progress("peak memory")
        add_memory(records, device, lambda: time.time() - begin > effort.deadline)
    bandwidth = max(bandwidths)
    finish(records, device, bandwidth)
    return {
        "machine": {
            **description,
            "copy_gigabytes_per_second": _rounded(bandwidth * 1e-9),
            "load_average": round(os.getloadavg()[1], 1),  # above the number of threads: others were at work too
        },
        "seconds": round(time.time() - begin),
        "skipped": skipped,
        "cases": records,
    }
