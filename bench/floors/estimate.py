"""From a floor and a reading of the machine code: how long every unit of an H100 would take alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bench.floors import machine
from bench.floors.floor import Floor, value

Row = Mapping[str, Any]

MEMORY, LOADS, CHAIN, ISSUE = "memory", "loads in flight", "chain of loads", "issue slots"
_UNITS = {"FMA": "FMA", "ALU": "ALU", "XU": "MUFU", "FP64": "FP64", "LSU": "LSU"}
SLACK = 1.2
"""Beyond so many times the floor a kernel needs a finding."""


@dataclass(frozen=True)
class Estimate:
    """Seconds.

    Attributes:
        floor: of the bytes and the operations, whatever the code is.
        times: what each limit would take alone, without the parts that are exposed.
        exposed: what adds to the longest of them.
    """

    floor: float
    times: Mapping[str, float]
    exposed: float

    @property
    def bound(self) -> str:
        """The limit that takes longest."""
        return max(self.times, key=lambda name: self.times[name])

    @property
    def time(self) -> float:
        return self.times[self.bound] + self.exposed

    @property
    def ratio(self) -> float:
        return self.time / self.floor


def _rate(unit: str) -> float:
    rates: dict[str, float] = {**machine.TENSOR, "fp32": machine.FP32, "fp64": machine.FP64}
    return rates[unit]


def _units(floor: Floor, row: Row, exposed: bool) -> dict[str, float]:
    """Seconds of each unit in the parts that are, or are not, exposed."""
    found: dict[str, float] = {}
    active = min(1.0, value(floor.programs, floor.shape) / machine.MULTIPROCESSORS)
    for part, counted in zip(floor.parts, row["parts"], strict=True):
        if part.exposed != exposed:
            continue
        passes = value(part.passes, {**floor.shape, "m": counted["markers"]})
        for unit, clocks in counted["work"].items():
            lanes = machine.ISSUE if unit == "issue" else machine.LANES[unit]
            name = ISSUE if unit == "issue" else _UNITS[unit]
            found[name] = found.get(name, 0.0) + machine.seconds(32 * passes * clocks, lanes) / active
    return found


def warps_at_a_time(floor: Floor, row: Row) -> float:
    """Warps on all multiprocessors together: what fits there, or all that are launched."""
    launched = value(floor.programs, floor.shape) * float(row["threads"]) / 32
    return min(float(row["warps"]) * machine.MULTIPROCESSORS, launched)


def estimate(floor: Floor, row: Row) -> Estimate:
    """The times of one kernel."""
    times = {MEMORY: floor.bytes_moved() / machine.HBM}
    least = times[MEMORY]
    operations = floor.operations_done() / _rate(floor.unit)
    if floor.unit in machine.TENSOR:
        times["tensor cores"] = operations
    least = max(least, operations)
    times |= _units(floor, row, exposed=False)
    in_flight = max((part["in_flight"] for part in row["parts"]), default=0)
    if in_flight and not row["tma"]:
        together = 32 * in_flight * warps_at_a_time(floor, row)
        times[LOADS] = value(floor.read, floor.shape) * machine.LATENCY / together
    times[CHAIN] = floor.rounds * machine.LATENCY
    return Estimate(least, times, max(_units(floor, row, exposed=True).values(), default=0.0))
