"""docs/benchmarks.md is made of nothing but prose, settings of the harness and results."""

from __future__ import annotations

import re
from typing import Any

import pytest

from bench import docs, docs_page, docs_peers, docs_readme, docs_reasons, docs_targets, machine, run, targets

MACHINE = {"device": "toaster", "torch": "2.13.0", "threads": 2, "load_average": 1.0, "packages": {"trl": "1.0"}}


def _record(met: bool, **more: Any) -> dict[str, Any]:
    rows = {
        "ours": {"kind": "ours", "median_us": 10.0},
        "eager": {"kind": "eager", "median_us": 20.0},
        "Liger": {"kind": "peer", "median_us": 15.0},
        "TRL": {"kind": "peer", "error": "RuntimeError: no"},
    }
    judged = [{"target": ">= 1x eager", "measured": 0.9, "met": met}]
    return {"op": "linear_grpo_loss", "case": "1x2x3 float32", "rows": rows, "targets": judged, **more}


def _benchmarks(met: bool, **more: Any) -> dict[str, Any]:
    return {"toaster.json": {"machine": MACHINE, "skipped": [], "cases": [_record(met, **more)]}}


def _targets(verdict: str, measured: float | None = 2.0) -> dict[str, Any]:
    line = {"op": "moe_router", "case": "host cost", "target": "<= 10 us above", "limit": 10.0}
    lines = [line | {"measured": measured, "verdict": verdict}]
    return {"targets-toaster.json": {"machine": MACHINE, "rounds": 9, "targets": lines}}


def _page(**records: Any) -> str:
    return docs_page.text({**{kind: {} for kind in docs.KINDS}, **records})


def test_a_reason_shows_only_while_its_target_is_missed() -> None:
    assert "Why targets are missed" not in _page(benchmarks=_benchmarks(True), targets=_targets("met", 9.0))
    page = _page(benchmarks=_benchmarks(False))
    assert "- `linear_grpo_loss` and " in page
    assert "- host cost: " not in page
    assert "- `linear_token_log_probs`" not in page
    page = _page(targets=_targets("SHORT", 12.0))
    assert "- host cost: " in page
    assert "- `linear_grpo_loss`" not in page
    assert "- host cost: " in _page(targets=_targets("FAILED", None))
    assert "Why targets are missed" not in _page(targets=_targets("reported"))


def test_what_is_missed_without_a_reason_says_so() -> None:
    missed = [("grpo_loss", "64x4096 new", ">= 3x eager")] * 2
    assert docs_reasons.lines(missed) == ["- `grpo_loss` 64x4096 new, >= 3x eager: not explained yet."]


def test_targets_of_a_machine() -> None:
    lines = docs_targets.text(_targets("SHORT", 12.34)).splitlines()
    assert "| `moe_router` host cost | <= 10 us above | 12.3 | SHORT |" in lines
    assert "### toaster" in lines
    text = " ".join(lines)
    assert "0 of 1 targets are met, 1 fall short by a fifth at most, 0 by more." in text
    assert "9 interleaved rounds" in text
    assert "| not measured | FAILED |" in docs_targets.text(_targets("FAILED", None))
    assert docs_targets.text({}) == "No machine has been measured yet."


def test_peers_that_ran_and_those_that_did_not() -> None:
    lines = docs_peers.text(_benchmarks(True, absent=["DeepGEMM"])).splitlines()
    assert "| Liger | `linear_grpo_loss` | toaster |" in lines
    assert "| TRL | `linear_grpo_loss` | **not run yet** |" in lines
    assert "| DeepGEMM | `linear_grpo_loss` | **not run yet** |" in lines
    assert docs_peers.versions(_benchmarks(True)) == "- toaster: trl 1.0"
    assert docs_peers.versions({"old.json": {"machine": {"device": "d"}, "cases": []}}) == ""


def test_the_harness_says_its_own_numbers() -> None:
    page = _page()
    assert f"`--seconds` is the time of a case ({run.FULL.seconds:g})" in page
    assert f"{targets.ROUNDS} interleaved rounds" in page
    assert not re.search(r"\{\{|\}\}", page)


def test_the_prose_holds_no_measured_figure() -> None:
    """Times, rates and ratios of a run come from a record."""
    prose = docs_page.TEMPLATE.read_text()
    assert not re.search(r"\d(\.\d+)?x\b(?! ?H)|\d [mu]s\b|GB/s\b(?!,? )|\d TFLOP|\d MiB", prose)


@pytest.mark.parametrize("template", ["{{a}} {{b}}", "nothing"])
def test_a_template_and_its_values_must_fit(template: str) -> None:
    with pytest.raises(ValueError, match="the template and the values differ in"):
        docs_page.render(template, {"a": "1"})
    assert docs_page.render("x {{a}}\n\n\n\ny", {"a": "1"}) == "x 1\n\ny"


def test_kinds_of_results_do_not_mix(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(docs, "RESULTS", tmp_path)
    (tmp_path / "a.json").write_text('{"machine": {}}')
    (tmp_path / "targets-a.json").write_text('{"machine": {}, "kind": "targets"}')
    (tmp_path / "other.json").write_text('{"combinations": {}}')
    assert list(docs.results()) == ["a.json"]
    assert list(docs.results("targets")) == ["targets-a.json"]


def test_versions_of_peers_are_recorded() -> None:
    assert set(machine.packages()) <= set(machine._PEERS)
    assert machine.describe("cpu")["packages"] == machine.packages()


def test_the_readme_shows_a_case_of_each_op_from_one_record() -> None:
    def record(shown: Any) -> dict[str, Any]:
        rows = {
            "ours": {"kind": "ours", "median_us": 20.0, "extra_bytes": 2**20},
            "ours, in place": {"kind": "ours", "median_us": 10.0, "extra_bytes": 0},
            "eager": {"kind": "eager", "median_us": 40.0, "extra_bytes": 30 * 2**20},
            "torch.compile": {"kind": "compile", "median_us": 25.0},
            "slow": {"kind": "peer", "median_us": 80.0},
            "rough": {"kind": "peer", "median_us": 15.0, "accuracy": "off"},
        }
        return {"op": shown.op, "case": shown.case, "rows": rows}

    cases = [record(shown) for shown in docs_readme.SHOWN]
    files = {
        "half.json": {"machine": MACHINE, "cases": cases[1:]},
        "toaster.json": {"machine": MACHINE, "cases": cases},
    }
    lines = docs_readme.text(files).splitlines()
    assert lines[0].startswith("On toaster, PyTorch 2.13.0, 2 threads")
    assert "`bench/results/toaster.json`" in " ".join(lines)
    assert len([line for line in lines if line.startswith("| ")]) == len(docs_readme.SHOWN) + 2
    assert "| `grpo_loss`, [64, 4096], clip and KL | 20 us | 2x | 1.25x | 0.75x * rough | 1.0 / 30 MiB |" in lines
    kept = "| `token_log_probs`, [2048, 32000] float32, in place | 10 us | 4x | 2.5x | 1.5x * rough | 0.0 / 30 MiB |"
    assert kept in lines
    with pytest.raises(ValueError, match="no record has every case"):
        docs_readme.text({"half.json": files["half.json"]})
