"""pytest-benchmark's view of the cases: see pytest_rows.py."""

from __future__ import annotations

import os
from typing import Any

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from . import case as case_module
from . import machine, measure, pytest_rows, run
from .case import Case, Record

_measured: dict[tuple[str, str], Record] = {}


def pytest_report_header() -> list[str]:
    if machine.default_device() == "cpu" and not machine.pages_are_recycled():
        return [f"bench: fresh pages; set GLIBC_TUNABLES={machine.RECYCLING} to time with recycled ones"]
    return []


def _record(case: Case) -> Record:
    key = (case.op, case.name)
    if key not in _measured:
        _measured.clear()  # the samples of one case at a time
        _measured[key] = measure.measure(case, machine.default_device(), run.QUICK)
    return _measured[key]


def _smoke(case: Case, provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the provider once on tiny inputs; ours must keep the accuracy budget."""
    monkeypatch.setattr(case_module, "compile_backend", "eager")
    torch._dynamo.reset()  # the cases before it count against the recompile limit
    inputs = measure.make_inputs(case, machine.default_device(), "smoke")
    chosen = case.provider(provider)
    if chosen.kind == "ours":
        assert case_module.Gate(case, inputs).problem(chosen, inputs) == ""
    else:
        chosen.run(inputs)


@pytest.fixture
def play(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> pytest_rows.Play:
    """Times one provider of a case, or runs it once where benchmarks are disabled."""

    def time_one(case: Case, provider: str) -> None:
        if benchmark.disabled:
            benchmark(_smoke, case, provider, monkeypatch)
            return
        record = _record(case)
        row = record["rows"][provider]
        if "seconds" not in row:
            benchmark.skipped = True
            pytest.skip(f"not timed: {row.get('accuracy') or row.get('error') or record.get('error')}")
        samples = row["seconds"]
        benchmark.extra_info.update(case=case.name, provider=provider, kind=row["kind"], clock=row["clock"])
        benchmark.pedantic(pytest_rows.advance, args=(iter(samples),), rounds=len(samples))

    return time_one
