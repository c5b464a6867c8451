"""The benchmarks: every provider computes the same thing, failures are reported, results are derived as documented."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import clock, derive, limits, report, run
from bench.case import Case, Gate, Inputs, Provider, Record
from bench.limits import Limits
from bench.measure import Effort, make_inputs, measure
from bench.progress import Progress
from bench.target import Target
from grpo_kernels import _extension

ROOT = Path(__file__).parents[1]
SHORT = Effort(seconds=0.01, minimum_rounds=2, maximum_rounds=2, memory=False)


@pytest.mark.skipif(bool(_extension.cpu_problem()), reason=f"native CPU kernels: {_extension.cpu_problem()}")
def test_every_benchmark_runs_once_and_is_accurate() -> None:
    command = [sys.executable, "-m", "pytest", "bench", "-q", "--benchmark-disable", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    providers = sum(len(case.providers) for case in run.cases(run.machine.default_device()))
    assert f"{providers} passed" in done.stdout


def _add(more: float):
    return lambda inputs: (inputs["x"] + 1 + more,)


_right = _add(0.0)


def _fail(inputs: Inputs) -> tuple[torch.Tensor]:
    raise torch.OutOfMemoryError("out of\nmemory")


def _fake_case(ours=_right, **fields) -> Case:
    return Case(
        op="group_advantages",
        name="8",
        make=lambda device, size: {"x": torch.arange(8.0, device=device)},
        providers=(Provider("ours", ours, "ours"), Provider("eager", _right, "eager")),
        bytes_moved=64,
        targets=(
            Target(">= 1e-9x eager", 1e-9, lambda rows: rows["ours"].get("speedup")),
            Target("<= 0 us", 0.0, lambda rows: rows["eager"].get("median_us"), at_least=False),
        ),
        **fields,
    )


def test_an_inaccurate_provider_is_reported_and_not_timed() -> None:
    record = measure(_fake_case(_add(1e-3)), "cpu", SHORT)
    assert "seconds" not in record["rows"]["ours"]
    assert "exceeds the budget" in record["rows"]["ours"]["accuracy"]
    assert len(record["rows"]["eager"]["seconds"]) == 2


def test_of_host_costs_eleven_rounds_count_as_one() -> None:
    record = measure(_fake_case(clock="host"), "cpu", SHORT)
    assert len(record["rows"]["ours"]["seconds"]) == 11 * SHORT.minimum_rounds


def test_a_provider_that_raises_is_reported_and_the_others_are_timed() -> None:
    record = measure(_fake_case(_fail), "cpu", SHORT)
    assert record["rows"]["ours"]["error"] == "OutOfMemoryError: out of memory"
    assert len(record["rows"]["eager"]["seconds"]) == 2


def test_a_provider_that_raises_while_it_is_timed_leaves_the_rounds() -> None:
    order = []

    def fake(name: str, fails_at: int) -> clock.Runner:
        def round() -> float:
            order.append(name)
            if order.count(name) == fails_at:
                raise RuntimeError("illegal\nmemory access")
            return 1.0

        return clock.Runner(Provider(name, _right, "peer"), round, "wall clock")

    a, b = fake("a", fails_at=2), fake("b", fails_at=99)
    clock.interleave([a, b], seconds=60, minimum=1, maximum=4, step=lambda text: None)
    assert order == ["a", "b", "b", "a", "b", "b"]
    assert a.error == "RuntimeError: illegal memory access"
    assert (b.error, b.samples) == ("", [1.0] * 4)


def test_a_case_whose_inputs_fail_does_not_end_the_run(monkeypatch) -> None:
    monkeypatch.setattr(limits, "copy_bandwidth", lambda device: 1e9)

    def too_large(device: str, size: str) -> Inputs:
        raise torch.OutOfMemoryError("8 TiB")

    cases = [Case("group_advantages", "large", too_large, _fake_case().providers), _fake_case()]
    results = run.run("cpu", SHORT, cases, Progress())
    assert [record.get("error") for record in results["cases"]] == ["OutOfMemoryError: 8 TiB", None]
    assert report.problems(results) == ["group_advantages, large: OutOfMemoryError: 8 TiB"]
    assert "median_us" in results["cases"][1]["rows"]["ours"]


def _record(case: Case) -> Record:
    record = measure(case, "cpu", SHORT)
    record["rows"]["ours"]["seconds"], record["rows"]["eager"]["seconds"] = [1e-6, 2e-6, 3e-6], [8e-6, 4e-6, 2e-6]
    derive.summarise(record)
    return record


def test_results_are_derived_judged_and_saved(tmp_path, capsys) -> None:
    case = _fake_case()
    record = _record(case)
    derive.finish(record, case, Limits("cpu", copy=64e6))
    ours = record["rows"]["ours"]
    assert (ours["median_us"], ours["min_us"], ours["iqr_us"], ours["rounds"]) == (2.0, 1.0, 1.0, 3)
    assert (ours["speedup"], ours["gigabytes_per_second"], ours["percent_of_copy"]) == (2.0, 0.032, 50.0)
    assert "teraflops" not in ours
    assert [target["met"] for target in record["targets"]] == [True, False]
    info = {"device": "d", "torch": "t", "python": "p", "threads": 1, "copy_gigabytes_per_second": 1.0}
    results = {"machine": info, "seconds": 1, "skipped": [], "checks": ["mine"], "cases": [record]}
    path = tmp_path / "new" / "results.json"
    report.save(results, path)
    assert report.load(path) == json.loads(path.read_text()) == results
    report.show(results)
    shown = capsys.readouterr().out
    assert "1 of 2 targets met" in shown
    assert "2.00x" in shown
    assert "TFLOP/s" not in shown


def test_rates_of_arithmetic_refer_to_the_measured_matmul(capsys) -> None:
    case = _fake_case(operations=6_000_000, matmul_dtype=torch.bfloat16)
    record = _record(case)
    assert (record["operations"], record["matmul_dtype"], record["bytes_moved"]) == (6_000_000, "bfloat16", 64)
    derive.finish(record, case, Limits("cpu", copy=64e6, matmul={"bfloat16": 4e12}))
    assert record["rows"]["ours"]["teraflops"] == 3.0
    assert record["rows"]["ours"]["percent_of_matmul"] == 75.0
    derive.finish(record, case, Limits("cpu", copy=64e6, matmul={"bfloat16": 5e12}))  # the limit rose during the run
    assert record["rows"]["ours"]["percent_of_matmul"] == 60.0
    report.table(record).show()
    assert "TFLOP/s" in capsys.readouterr().out


def test_products_of_fp8_are_put_beside_bfloat16s_rate_too(capsys) -> None:
    case = _fake_case(operations=6_000_000, matmul_dtype=torch.float8_e4m3fn, beside_bfloat16=True)
    record = _record(case)
    derive.finish(record, case, Limits("cpu", copy=64e6, matmul={"float8_e4m3fn": 6e12, "bfloat16": 2e12}))
    ours = record["rows"]["ours"]
    assert (ours["percent_of_matmul"], ours["percent_of_bfloat16_matmul"]) == (50.0, 150.0)
    report.table(record).show()
    assert "of bf16 matmul" in capsys.readouterr().out
    assert limits.wanted_dtypes(case.limit_dtypes) == (torch.bfloat16, torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="for products of another dtype"):
        _fake_case(operations=1, matmul_dtype=torch.bfloat16, beside_bfloat16=True)


def test_operations_need_the_dtype_whose_rate_is_their_limit() -> None:
    with pytest.raises(ValueError, match="operations and matmul_dtype go together"):
        _fake_case(operations=1)


def test_limits_are_measured_twice_at_least_and_the_best_counts(monkeypatch) -> None:
    copies, products = iter([3e9, 5e9]), iter([7e12, 2e12])
    monkeypatch.setattr(limits, "copy_bandwidth", lambda device: next(copies))
    monkeypatch.setattr(limits, "matmul_rate", lambda device, dtype: next(products))
    case = _fake_case(operations=64, matmul_dtype=torch.float32)
    results = run.run("cpu", SHORT, [case], Progress())
    assert results["machine"]["copy_gigabytes_per_second"] == 5.0
    assert results["machine"]["matmul_teraflops"] == {"float32": 7.0}
    assert results["machine"]["tf32"] is False


def test_matmul_rate_is_measured_only_where_a_case_refers_to_it(monkeypatch) -> None:
    monkeypatch.setattr(limits, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(limits, "matmul_rate", None)
    results = run.run("cpu", SHORT, [_fake_case()], Progress())
    assert "matmul_teraflops" not in results["machine"]


def test_what_a_cpu_multiplies_slowly_it_can_widen_first(monkeypatch) -> None:
    rates = {torch.bfloat16: 2e9, torch.float16: 9e9, torch.float32: 7e9}
    monkeypatch.setattr(limits, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(limits, "matmul_rate", lambda device, dtype: rates[dtype])
    for device, slow in (("cpu", 7e9), ("cuda", 2e9)):
        found = Limits(device, (torch.bfloat16, torch.float16))
        found.measure()
        assert found.matmul == {"bfloat16": slow, "float16": 9e9}


def test_matmul_rate_counts_two_operations_a_multiply_add(monkeypatch) -> None:
    monkeypatch.setattr(limits, "_CPU_MATMULS", (4, 8, 16))
    seconds = iter([1e-3, 0.1])  # the second is long enough to end the search
    monkeypatch.setattr(limits, "_fastest", lambda work, device, repetitions: work() is not None and next(seconds))
    assert limits.matmul_rate("cpu", torch.bfloat16) == max(2 * 4**3 / 1e-3, 2 * 8**3 / 0.1)


def test_with_a_deadline_the_short_list_comes_first_and_the_rest_is_named(monkeypatch) -> None:
    monkeypatch.setattr(limits, "copy_bandwidth", lambda device: 1e9)
    now = iter(range(0, 1000, 10))
    monkeypatch.setattr(run.time, "time", lambda: float(next(now)))

    def case(name: str, **fields) -> Case:
        return Case("group_advantages", name, _fake_case().make, _fake_case().providers, **fields)

    cases = [case("long"), case("of the host", clock="host"), case("short", quick=True)]
    effort = Effort(seconds=0.01, minimum_rounds=1, maximum_rounds=1, memory=False, deadline=35.0)
    results = run.run("cpu", effort, cases, Progress())
    assert [record["case"] for record in results["cases"]] == ["of the host", "short"]
    assert results["skipped"] == ["group_advantages: long"]
    now = iter(range(0, 1000, 10))
    cases = [case("short", quick=True), case("of FP8", quick=True), case("long, of FP8")]
    results = run.run("cpu", dataclasses.replace(effort, first=("int8", "FP8"), deadline=25.0), cases, Progress())
    assert results["skipped"] == ["group_advantages: short", "group_advantages: long, of FP8"]


def test_what_is_measured_so_far_is_handed_on_after_every_case(monkeypatch) -> None:
    monkeypatch.setattr(limits, "copy_bandwidth", lambda device: 1e9)
    cases = [_fake_case(), Case("group_advantages", "9", _fake_case().make, _fake_case().providers)]
    lengths: list[int] = []
    run.run("cpu", SHORT, cases, Progress(), lambda results: lengths.append(len(results["cases"])))
    assert lengths == [1, 2]


@pytest.mark.parametrize(
    ("device", "free", "sets"),
    [
        ("cpu", 2**40, 8),  # twice the cache
        ("cpu", 4 * 3 * 2**20, 3),  # a quarter of the memory
        ("cpu", 0, 1),
        ("cuda", 2**40, 8),
    ],
)
def test_inputs_fill_the_cache_twice_but_a_quarter_of_the_memory_at_most(monkeypatch, device, free, sets) -> None:
    monkeypatch.setattr(clock, "cache_bytes", lambda device: 4 * 2**20)
    monkeypatch.setattr(clock, "free_bytes", lambda device: free)
    inputs = {"x": torch.zeros(2**20, dtype=torch.uint8)}
    assert len(clock.input_sets(inputs, device)) == sets
    assert len(clock.input_sets(inputs, device, 1)) == 1


def test_every_case_has_one_baseline_and_its_own_name() -> None:
    cases = run.cases("cpu")
    assert len({(case.op, case.name) for case in cases}) == len(cases)
    for case in cases:
        assert sum(provider.kind == "eager" for provider in case.providers) == 1
        assert sum(provider.kind == "ours" for provider in case.providers) >= 1


def test_every_file_of_cases_is_run() -> None:
    assert {path.stem.removeprefix("bench_") for path in (ROOT / "bench").glob("bench_*.py")} == set(run.MODULES)


def test_the_gate_sees_a_wrong_gradient() -> None:
    case = run.cases("cpu")[0]
    inputs = make_inputs(case, "cpu", "smoke")
    wrong = Provider("wrong", lambda inputs: [t * 1.001 for t in case.eager.run(inputs)], "ours")
    assert "exceeds the budget" in Gate(case, inputs).problem(wrong, inputs)


def test_the_gate_holds_one_number_to_the_rounding_errors_of_the_other_outputs() -> None:
    """In float32 the first number is exact by luck and the others are not: a tenth has no finite binary fraction."""

    def define(inputs):
        return [inputs["x"].sum(), inputs["x"] / 10]

    inputs = {"x": torch.arange(8.0)}
    gate = Gate(_fake_case(definition=define), inputs)
    for error, holds in ((1.5e-7, True), (1e-6, False)):
        total, tenths = define(inputs)
        off = Provider("off", lambda _, total=total, tenths=tenths, error=error: [total * (1 + error), tenths], "ours")
        assert (gate.problem(off, inputs) == "") == holds, error


@pytest.mark.skipif(bool(_extension.cpu_problem()), reason=f"native CPU kernels: {_extension.cpu_problem()}")
def test_the_gate_of_fp8_sees_a_layer_in_bfloat16() -> None:
    case = next(case for case in run.cases("cpu") if case.name.endswith("fp8_block128 fwd+bwd"))
    inputs = make_inputs(case, "cpu", "smoke")
    gate = Gate(case, inputs)
    assert gate.problem(case.provider("ours"), inputs) == ""
    assert "exceeds the budget" in gate.problem(case.provider("ours in bf16"), inputs)


def test_the_gate_sees_wrong_shapes_and_numbers_of_results() -> None:
    case = _fake_case()
    gate = Gate(case, case.make("cpu", "full"))
    inputs = case.make("cpu", "full")
    assert gate.problem(Provider("two", lambda inputs: [inputs["x"]] * 2, "ours"), inputs) == (
        "returned 2 tensors, expected 1"
    )
    short = Provider("short", lambda inputs: [inputs["x"][:3] + 1], "ours")
    assert "must have the shape of expected, [8], got [3]" in gate.problem(short, inputs)
