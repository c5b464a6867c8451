"""`python -m bench.targets`: every target of the design has a case, is judged as documented, and is recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import docs_reasons, limits, machine, memory, run, targets
from bench.case import Case, Inputs, Provider
from bench.measure import Effort
from bench.progress import Progress
from bench.target import Target

_HOST = "<= 10 us above autograd.Function and allocation"


@pytest.mark.parametrize(
    ("measured", "limit", "at_least", "expected"),
    [
        (3.0, 3.0, True, "met"),
        (2.41, 3.0, True, "SHORT"),
        (2.39, 3.0, True, "FAILED"),
        (10.0, 10.0, False, "met"),
        (12.5, 10.0, False, "SHORT"),
        (12.6, 10.0, False, "FAILED"),
        (0.3, None, True, "reported"),
        (None, None, True, "FAILED"),
        (None, 3.0, True, "FAILED"),
    ],
)
def test_verdicts(measured: float | None, limit: float | None, at_least: bool, expected: str) -> None:
    assert targets.verdict(measured, limit, at_least) == expected


@pytest.fixture(scope="module")
def found() -> list[Case]:
    """The cases of a CPU."""
    return targets.cases("cpu", targets.OPS["cpu"])


def test_every_reason_for_a_miss_is_for_a_target_that_there_is() -> None:
    every = run.cases("cpu")
    for reason in docs_reasons.REASONS:
        for op in reason.ops:
            promised = [(case, target) for case in every if case.op == op for target in case.targets]
            assert any(reason.fits(op, case.name, target.text) for case, target in promised), (reason.subject, op)


def test_every_line_of_the_design_has_a_case(found: list[Case]) -> None:
    """The column for CPUs of section 9, line by line: op -> dtype in the case's name -> targets."""
    promised = {
        ("token_log_probs", "float32"): {"in place >= 2.5x eager", "in place >= 2x torch.compile"},
        ("token_log_probs", "bfloat16"): {"in place >= 3x eager", "in place >= 2x torch.compile"},
        ("linear_token_log_probs", "float32"): {
            ">= 0.75x eager",
            "memory above inputs and gradients <= 1/5 of eager's",
        },
        ("linear_token_log_probs", "bfloat16"): {
            "speed against eager",
            "memory above inputs and gradients <= 1/5 of eager's",
        },
        ("linear_grpo_loss", "float32"): {">= 1x eager", "memory above inputs and gradients <= 1/8 of eager's"},
        ("linear_grpo_loss", "bfloat16"): {"memory above inputs and gradients <= 1/8 of eager's"},
        ("group_advantages", "B="): {">= 3x eager"},
        ("grpo_loss", "64x4096"): {">= 3x eager"},
        ("moe_router", "T="): {">= 2x eager"},
        ("build_permutation", "T="): {">= 2x eager"},
        ("moe_permute", "T="): {">= 1x eager"},
        ("moe_unpermute", "T="): {">= 1x eager"},
    }
    memory_of_rows = {"extra memory <= 1.2x the logits", "extra memory in place about 0 (<= 0.05x)"}
    for (op, word), texts in promised.items():
        chosen = [case for case in found if case.op == op and word in case.name and case.clock != "host"]
        assert chosen, f"{op} has no case of {word}"
        for case in chosen:
            wanted = texts | memory_of_rows if op == "token_log_probs" else texts
            assert wanted <= {target.text for target in case.targets}, f"{op}, {case.name}"
    hosts = {case.op for case in found if case.clock == "host" and _HOST in {t.text for t in case.targets}}
    assert hosts == set(targets.OPS["cpu"]) - {"linear_token_log_probs", "linear_grpo_loss"}


def test_only_what_a_target_speaks_of_is_measured(found: list[Case]) -> None:
    for case in (case for case in found if case.op == "token_log_probs"):
        names = {provider.name for provider in case.providers}
        host = {"ours", "eager", "allocation alone"}
        assert names == (host if case.clock == "host" else {"ours", "ours, in place", "eager", "torch.compile"})


def _ratio(name: str) -> Any:
    def value(rows: Any) -> float | None:
        ours, other = rows["ours"].get("median_us"), rows[name].get("median_us")
        return None if ours is None or other is None else other / ours

    return value


def _fail(inputs: Inputs) -> tuple[torch.Tensor]:
    raise RuntimeError("no")


def _case(op: str = "group_advantages", other: Any = None, wanted: float = 1e-9) -> Case:
    def right(inputs: Inputs) -> tuple[torch.Tensor]:
        return (inputs["x"] + 1,)

    return Case(
        op=op,
        name="8",
        make=lambda device, size: {"x": torch.arange(8.0)},
        providers=(
            Provider("ours", right, "ours"),
            Provider("eager", right, "eager"),
            Provider("other", other or right, "peer"),
            Provider("unused", _fail, "peer"),
        ),
        targets=(
            Target("fast", wanted, _ratio("eager")),
            Target("faster than the other", 1e-9, _ratio("other")),
            Target("small", 0.5, lambda rows: rows["ours"].get("extra_memory_ratio"), at_least=False),
            Target("the other's speed", None, _ratio("other")),
        ),
        memory=100,
    )


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """Instead of the benchmarks' cases: those that a test puts in here."""
    chosen: list[Case] = []
    monkeypatch.setattr(limits, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(
        memory, "peaks_in_new_process", lambda op, provider, names, size, cases: (dict.fromkeys(names, 30), "")
    )
    monkeypatch.setattr(run, "cases", lambda device: chosen)
    monkeypatch.setattr(machine, "pages_are_recycled", lambda: True)
    return chosen


def _main(monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr("sys.argv", ["bench.targets", "--device", "cpu", *options])
    return targets.main()


def test_a_run_is_judged_recorded_and_shown(tiny, monkeypatch, tmp_path: Path, capsys) -> None:
    tiny.append(_case())
    assert _main(monkeypatch, "--save", str(tmp_path / "a.json")) == 0
    results = json.loads((tmp_path / "a.json").read_text())
    assert (results["kind"], results["rounds"]) == ("targets", 9)
    assert {"device", "torch", "python", "threads", "load_average"} <= set(results["machine"])
    lines = {line["target"]: line for line in results["targets"]}
    assert [line["verdict"] for line in results["targets"]] == ["met", "met", "met", "reported"]
    assert (lines["small"]["measured"], lines["small"]["limit"]) == (0.3, 0.5)
    (figures,) = results["figures"]
    assert set(figures["rows"]) == {"ours", "eager", "other"}
    assert figures["rows"]["ours"]["extra_bytes"] == 30
    ratio = figures["rows"]["eager"]["median_us"] / figures["rows"]["ours"]["median_us"]
    assert lines["fast"]["measured"] == pytest.approx(ratio, rel=1e-3)
    assert "3 targets: 3 met, 0 SHORT, 0 FAILED; 9 rounds" in capsys.readouterr().out


def test_a_target_that_is_missed_by_far_or_not_measured_fails(tiny, monkeypatch, tmp_path: Path, capsys) -> None:
    tiny.append(_case(wanted=1e9))
    assert _main(monkeypatch, "--save", str(tmp_path / "a.json")) == 1
    tiny[:] = [_case(other=_fail)]
    assert _main(monkeypatch, "--save", str(tmp_path / "a.json")) == 1
    lines = json.loads((tmp_path / "a.json").read_text())["targets"]
    assert [line["verdict"] for line in lines] == ["met", "FAILED", "met", "FAILED"]
    assert lines[1]["why"] == "other: RuntimeError: no"
    assert "4 targets: 2 met, 0 SHORT, 2 FAILED" in capsys.readouterr().out


def test_some_ops_alone_are_not_recorded(tiny, monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr(targets, "RESULTS", tmp_path)
    tiny += [_case(), _case(op="grpo_loss")]
    assert _main(monkeypatch, "--op", "grpo_loss") == 0
    assert not list(tmp_path.iterdir())
    assert "group_advantages" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        _main(monkeypatch, "--op", "moe_experts")
    assert "--op must be one of group_advantages, " in capsys.readouterr().err


def test_ops_without_a_promise_are_left_out(tiny) -> None:
    tiny += [_case(), _case(op="moe_experts")]
    assert [case.op for case in targets.cases("cpu", targets.OPS["cpu"])] == ["group_advantages"]


def test_a_shorter_effort_says_so(tiny) -> None:
    effort = Effort(seconds=0.0, minimum_rounds=1, maximum_rounds=1, memory=False)
    results = targets.measure("cpu", [targets.trimmed(_case())], Progress(), effort)
    assert results["rounds"] == 1
    assert [line["verdict"] for line in results["targets"]][2] == "FAILED"
