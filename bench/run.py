"""Runs cases one after another, and memory on a CPU after them; what comes out is plain data for JSON."""

from __future__ import annotations

import importlib
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from . import clock, limits, machine, memory
from .case import Case, Record
from .derive import finish, rounded, summarise
from .limits import Limits
from .measure import Effort, measure
from .progress import Progress
from .target import Rows

MODULES = (
    "group_advantages",
    "token_log_probs",
    "grpo_loss",
    "linear_log_probs",
    "multi_token_prediction",
    "speculative_sampling",
    "moe_router",
    "moe_permute",
    "fp8_quantize",
    "moe_permute_quantize",
    "grouped_gemm",
    "moe_experts",
)

FULL = Effort()
QUICK = Effort(seconds=1.5, minimum_rounds=3, memory=False)


def _cases_by_module(device: str) -> dict[str, list[Case]]:
    return {name: importlib.import_module(f".bench_{name}", __package__).cases(device) for name in MODULES}


def cases(device: str) -> list[Case]:
    """Every case of every op on this type of device."""
    return [case for found in _cases_by_module(device).values() for case in found]


def names(device: str) -> list[str]:
    """What `choose` knows: modules, and the ops of those that have several."""
    return list(dict.fromkeys([*MODULES, *(case.op for case in cases(device))]))


def _asking(records: Iterable[Record], chosen: Sequence[Case]) -> list[tuple[str, str, Rows]]:
    """Op, case and rows of the cases that ask for memory, without parts of the work."""
    cases = {(case.op, case.name) for case in chosen if case.memory}
    return [
        (record["op"], record["case"], {name: row for name, row in record["rows"].items() if row["kind"] != "part"})
        for record in records
        if (record["op"], record["case"]) in cases
    ]


def choose(device: str, ops: Sequence[str] | None, quick: bool) -> list[Case]:
    """The cases of these ops or modules (None: all)."""
    return [
        case
        for module, found in _cases_by_module(device).items()
        for case in found
        if (ops is None or case.op in ops or module in ops) and (case.quick or not quick)
    ]


class _Run:
    """Everything so far, and the file's content that can be made of it."""

    def __init__(self, device: str, chosen: Sequence[Case]) -> None:
        self.begin = time.time()
        self.chosen = chosen
        self.description = machine.describe(device)
        self.limits = Limits(device, limits.wanted_dtypes(dtype for case in chosen for dtype in case.limit_dtypes))
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


def _urgency(case: Case, first: Sequence[str]) -> int:
    """The order under a deadline: the short list, so that every op has its figures, and then what takes no time. Of the
    short list what was asked for comes first."""
    if case.quick:
        return 0 if any(word in f"{case.op}: {case.name}" for word in first) else 1
    return 2 if case.clock == "host" else 3


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
    in_haste = not math.isinf(effort.deadline)
    for case in sorted(chosen, key=lambda case: _urgency(case, effort.first)) if in_haste else chosen:
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
        asking = _asking(state.records.values(), chosen)
        memory.add_peaks(asking, progress, late=lambda: state.elapsed() > effort.deadline)
    return state.results()
