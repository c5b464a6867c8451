"""Every benchmark runs, and every provider in it computes the same thing: on tiny inputs, without timing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import report, run
from bench.case import Case, Gate, Provider, Target
from grpo_kernels import _extension

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(bool(_extension.cpu_problem()), reason=f"native CPU kernels: {_extension.cpu_problem()}")
def test_every_benchmark_runs_once_and_is_accurate() -> None:
    command = [sys.executable, "-m", "pytest", "bench", "-q", "--benchmark-disable", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


def _fake_case(wrong: float) -> Case:
    def add(inputs, more):
        return (inputs["x"] + 1 + more,)

    return Case(
        op="group_advantages",
        name="8",
        make=lambda device, size: {"x": run.torch.arange(8.0, device=device)},
        providers=(
            Provider("ours", lambda inputs: add(inputs, wrong), "ours"),
            Provider("eager", lambda inputs: add(inputs, 0.0), "eager"),
        ),
        bytes_moved=64,
        targets=(
            Target(">= 1e-9x eager", 1e-9, lambda rows: rows["ours"].get("speedup")),
            Target("<= 0 us", 0.0, lambda rows: rows["eager"].get("median_us"), at_least=False),
        ),
    )


def test_an_inaccurate_provider_is_reported_and_not_timed() -> None:
    record = run.measure(_fake_case(1e-3), "cpu", run.Effort(seconds=0.01, minimum_rounds=2, maximum_rounds=2))
    assert "seconds" not in record["rows"]["ours"]
    assert "exceeds the budget" in record["rows"]["ours"]["accuracy"]
    assert len(record["rows"]["eager"]["seconds"]) == 2


def test_results_are_derived_judged_and_saved(monkeypatch, tmp_path, capsys) -> None:
    case = _fake_case(0.0)
    monkeypatch.setattr(run, "cases", lambda device: [case])
    record = run.measure(case, "cpu", run.Effort(seconds=0.01, minimum_rounds=3, maximum_rounds=3))
    record["rows"]["ours"]["seconds"], record["rows"]["eager"]["seconds"] = [1e-6, 2e-6, 3e-6], [8e-6, 4e-6, 2e-6]
    run.finish([record], "cpu", bandwidth=64e6)
    ours = record["rows"]["ours"]
    assert (ours["median_us"], ours["min_us"], ours["rounds"], ours["speedup"]) == (2.0, 1.0, 3, 2.0)
    assert ours["percent_of_copy"] == pytest.approx(50.0)
    assert [target["met"] for target in record["targets"]] == [True, False]
    info = {
        "device": "d",
        "torch": "t",
        "python": "p",
        "threads": 1,
        "copy_gigabytes_per_second": 1.0,
        "pages": "recycled",
    }
    info["copy_gigabytes_per_second"] = 1.0
    results = {"machine": info, "seconds": 1, "skipped": [], "cases": [record]}
    path = tmp_path / "new" / "results.json"
    report.save(results, path)
    assert json.loads(path.read_text()) == results
    report.show(results)
    shown = capsys.readouterr().out
    assert "1 of 2 targets met" in shown
    assert "2.00x" in shown


def test_every_case_has_one_baseline_and_its_own_name() -> None:
    cases = run.cases("cpu")
    assert len({(case.op, case.name) for case in cases}) == len(cases)
    for case in cases:
        assert sum(provider.kind == "eager" for provider in case.providers) == 1
        assert sum(provider.kind == "ours" for provider in case.providers) >= 1


def test_the_gate_sees_a_wrong_gradient() -> None:
    case = run.cases("cpu")[0]
    inputs = run.make_inputs(case, "cpu", "smoke")
    wrong = Provider("wrong", lambda inputs: [t * 1.001 for t in case.eager.run(inputs)], "ours")
    assert "exceeds the budget" in Gate(case, inputs).problem(wrong, inputs)
