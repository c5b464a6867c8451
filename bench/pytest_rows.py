"""The same cases under pytest-benchmark: `pytest bench --benchmark-only`, or `--benchmark-disable` for a dry run.

pytest-benchmark times one test after another. Competing providers must be interleaved, so the first test of a case
measures all of them, and each test then plays its samples back on a clock that only they advance.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import pytest

from . import machine, run
from .case import Case

_now = 0.0


class Play(Protocol):
    """The fixture `play`: times one provider of a case, or runs it once where benchmarks are disabled."""

    def __call__(self, case: Case, provider: str) -> None: ...


def sample_clock() -> float:
    """Seconds; moves only when a measured sample is played."""
    return _now


def advance(samples: Iterator[float]) -> None:
    """Plays the next sample."""
    global _now
    _now += next(samples)


def parameters() -> list[Any]:
    """One test per provider of every case, grouped by case."""
    found = []
    for case in run.cases(machine.default_device()):
        group = pytest.mark.benchmark(group=f"{case.op}: {case.name}", timer=sample_clock)
        found += [
            pytest.param(case, provider.name, id=f"{case.op}-{case.name}-{provider.name}", marks=group)
            for provider in case.providers
        ]
    return found
