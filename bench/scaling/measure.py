"""Measures the sweeps: time of all providers in turn, then peak memory in fresh processes."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from .. import machine, memory
from ..derive import summarise
from ..measure import Effort, measure
from ..progress import Progress
from ..target import Rows
from .sweeps import Sweep

EFFORT = Effort(seconds=0.7, minimum_rounds=5, maximum_rounds=15)
KEPT = ("kind", "median_us", "iqr_us", "extra_bytes", "error", "accuracy")

Point = dict[str, Any]
Results = dict[str, Any]


def _time(sweep: Sweep, effort: Effort, progress: Progress) -> list[Point]:
    points = []
    for size in sweep.sizes:
        case = sweep.case(size)
        progress.case(f"{sweep.op}: {case.name}")
        record = measure(case, "cpu", effort, progress)
        summarise(record)
        point = {"size": size, "rows": record["rows"]}
        if "error" in record:
            point["error"] = record["error"]
        points.append(point)
    return points


def _asking(sweeps: Sequence[Sweep], points: Sequence[list[Point]]) -> list[tuple[str, str, Rows]]:
    """Op, case and rows of the sweeps that ask for memory: ours and eager PyTorch's."""
    return [
        (
            sweep.op,
            f"{sweep.axis}={point['size']}",
            {name: row for name, row in point["rows"].items() if row["kind"] in ("ours", "eager")},
        )
        for sweep, of in zip(sweeps, points, strict=True)
        if sweep.memory
        for point in of
    ]


def _plain(points: Sequence[Point]) -> list[Point]:
    """What is recorded of each point."""
    return [
        point | {"rows": {n: {k: row[k] for k in KEPT if k in row} for n, row in point["rows"].items()}}
        for point in points
    ]


def run(sweeps: Sequence[Sweep], ranks: Sequence[Any], progress: Progress, effort: Effort = EFFORT) -> Results:
    """The content of the record. `ranks`: sweeps over processes, which have their own way to run."""
    begin = time.time()
    progress.begin(sum(len(sweep.sizes) for sweep in sweeps) + sum(len(sweep.sizes) for sweep in ranks))
    points = [_time(sweep, effort, progress) for sweep in sweeps]
    if effort.memory:
        memory.add_peaks(_asking(sweeps, points), progress, "scaling.sweeps")
    found = [(sweep, _plain(of)) for sweep, of in zip(sweeps, points, strict=True)]
    found += [(sweep, sweep.measure(progress)) for sweep in ranks]
    described = machine.describe("cpu")
    described["load_average"] = round(os.getloadavg()[1], 1)
    return {
        "kind": "scaling",
        "machine": described,
        "seconds": round(time.time() - begin),
        "sweeps": [
            {"op": sweep.op, "axis": sweep.axis, "what": sweep.what, "fixed": sweep.fixed, "points": of}
            for sweep, of in found
        ],
    }
