"""Figures, tables and progress of examples.r1, of made-up runs: nothing is trained here."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from examples.r1.measuring.loss_step import LossStepComparison
from examples.r1.quick import QUICK
from examples.r1.reporting import html_report, report, stage_figures
from examples.r1.reporting.figures import duration, ends, mean, number, percent, rate, size, times, worded
from examples.r1.reporting.progress_bar import progress_bar, words
from examples.r1.results import PipelineResult, Record, StageResult
from examples.r1.settings import Settings
from python_tests import r1_results
from python_tests.r1_results import DIGITS, NAN, RUNS, WORDS, bare, full

every_run = pytest.mark.parametrize("make", RUNS.values(), ids=RUNS)


def shown(result: PipelineResult, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width, record=True)
    report.show(result, console)
    return console.export_text()


@every_run
def test_results_come_back_from_json(make: Callable[[], PipelineResult]) -> None:
    result = make()
    again = PipelineResult.from_json(json.loads(json.dumps(result.as_json(), allow_nan=False)))
    assert again.as_json() == PipelineResult.from_json(again.as_json()).as_json()
    assert again.model is None
    assert [stage.name for stage in again.stages] == [stage.name for stage in result.stages]
    assert shown(again) == shown(result)
    assert html_report.page(again) == html_report.page(result)


def test_numbers_come_back_to_the_bit() -> None:
    stage = StageResult("cold_start", "1", 1, 0.1 + 0.2, [{"loss": 1 / 3}], [{"step": 0.0}])
    result = PipelineResult(Settings(seed=3, output=Path("a/b"), start_from=Path("c")), 5, [stage])
    again = PipelineResult.from_json(json.loads(json.dumps(result.as_json())))
    assert again == result


def test_the_loss_step_is_shown_as_it_was_measured() -> None:
    comparison = LossStepComparison(4, 3, 2, 10, 0.5, 1.0, 100, 200)
    result = PipelineResult(Settings(), 0, loss_step=comparison._asdict())
    assert result.as_json()["loss_step"]["eager_peak_bytes"] == 200
    assert "4 x 3 x 2" in shown(result)
    assert "(2.00x)" in shown(result)


@pytest.mark.parametrize("content", [[], {}, {"stages": None}, {"stages": 3}, "results"])
def test_other_files_are_no_results(content: object) -> None:
    with pytest.raises(ValueError, match="not the results of a run"):
        PipelineResult.from_json(content)  # type: ignore[arg-type]


def test_old_files_get_defaults_and_lose_what_is_unknown() -> None:
    content = {"stages": [{"name": "cold_start", "steps": None}], "settings": {"seed": 4, "phase": "of the moon"}}
    result = PipelineResult.from_json(content)
    assert (result.settings, result.stages) == (Settings(seed=4), [StageResult("cold_start", "")])


def test_the_last_evaluation_of_the_policy_is_the_final_one() -> None:
    result = r1_results.run()
    assert result.final == result.stages[-1].evaluations[-1]
    result.stages = result.stages[:3]  # the reward model's looks have no accuracy
    assert result.final == result.stages[1].evaluations[-1]
    assert bare().final == {}
    assert result.stage("reasoning_rl") is result.stages[1]
    assert result.stage("diverse_rl") is None


def cells(text: str, label: str) -> list[list[str]]:
    """What stands behind a label in the tables, one under the other."""
    return [line.split(label, 1)[1].split() for line in text.splitlines() if label in line]


def test_tables_show_what_was_measured() -> None:
    result = full()
    text = shown(result, width=60)  # too narrow for two tables side by side
    assert [stage.title.split("  ")[-1].strip().lower() in text.lower() for stage in result.stages] == [True] * 5
    (cold, reasoning, rejection, diverse) = cells(text, "digit sorting, greedy")
    assert cold == ["0.000", number(result.stages[0].after[f"{DIGITS}/accuracy"])]
    assert diverse[1] == number(result.final[f"{DIGITS}/accuracy"])
    assert reasoning[0] == "0.710"
    assert rejection[0] == "0.000"
    assert cells(text, "validation loss, nats a token")[0] == ["3.200", "0.412"]
    assert cells(text, "entropy, nats")[0] == ["0.302", "0.086"]
    assert cells(text, "spelling backward, judge's score") == [["0.720", "0.720"]]
    assert cells(text, "tokens/s, sampling")[0] == ["40,000"]
    assert cells(text, "tokens/s, training")[0] == ["24,000"]
    assert cells(text, "digit sorting, kept right") == [["99.8%"]]
    assert cells(text, "digit sorting, prompts kept") == [["583", "of", "600,", "97.2%"]]
    assert cells(text, "groups that teach")[0][0].endswith("%")
    assert cells(text, "busiest expert over the mean")[1] == ["1.44", "1.43"]
    assert cells(text, "routes changed, last update")[0] == ["1.1%", "1.1%"]
    assert cells(text, "drafts accepted, depth 1")[0] == ["0.928", "0.969"]
    assert cells(text, "right answer of a pair preferred") == [["0.510", "1.000"]]


def test_the_table_of_model_state_has_what_was_compared() -> None:
    text = shown(full())
    assert cells(text, "critic")[0] == ["262,144", "4+4+8", "4.000", "–"]
    assert cells(text, "rewards by rules")[0] == ["9.000", "5.000", "44.4%"]
    assert "Measured here: 44.4%" in " ".join(text.split())
    assert "Model state" not in shown(bare())


def test_the_summary_names_aims_and_comparisons() -> None:
    lines = {line.label: line for line in stage_figures.summary(full())}
    assert lines["digit sorting"].holds is True
    assert lines["digit sorting"].value.endswith("aim 0.95")
    assert lines["spelling backward"].holds is True
    assert lines["judge, diverse RL"].holds is True
    assert lines["loss step, 256 x 24 x 64 x 64"].value == "5.40 ms; eager PyTorch 6.20 ms (1.15x)"
    assert lines["sampling with drafts"].value == "21,000 tokens/s; without 44,000 (0.48x as fast)"
    assert not any("PPO" in label for label in lines)
    other = full()
    other.loss_step = {**(other.loss_step or {}), "eager_seconds": None, "eager_peak_bytes": None, "note": "none <b>"}
    lines = {line.label: line for line in stage_figures.summary(other)}
    assert lines["loss step, 256 x 24 x 64 x 64"].value == "5.40 ms"
    assert lines["  beside eager PyTorch"].value == "none <b>"
    hacked = {line.label: line for line in stage_figures.summary(r1_results.run(hacked=True))}
    assert hacked["spelling backward"].holds is False
    assert hacked["judge, diverse RL"].holds is False
    assert "is hacked" in hacked["judge, diverse RL"].value


def test_a_shorter_run_than_the_recipe_does_not_fail_its_aims() -> None:
    result = r1_results.run(hacked=True)
    result.settings = replace(result.settings, **QUICK)
    lines = {line.label: line for line in stage_figures.summary(result)}
    assert (lines["digit sorting"].holds, lines["spelling backward"].holds) == (True, None)
    assert 'class="card fails"' not in html_report.page(result)


@every_run
@pytest.mark.parametrize("width", [40, 80, 200])
def test_any_run_is_shown(make: Callable[[], PipelineResult], width: int) -> None:
    text = shown(make(), width)
    assert "time" in text
    assert "nan" not in re.findall(r"[a-z]+", text)
    assert "None" not in text


def test_dense_runs_have_no_rows_of_experts_and_drafts() -> None:
    text = shown(r1_results.run())
    assert "expert" not in text
    assert "draft" not in text
    assert "PPO" not in text


def test_publish_writes_the_files(tmp_path: Path) -> None:
    settings = Settings(output=tmp_path / "run", report=tmp_path / "pages" / "out.html")
    result = replace(RUNS["single"](), settings=settings, machine={"processes": 2})
    text = io.StringIO()
    report.publish(result, Console(file=text, width=1000))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["curves.png", "results.json"]
    assert (tmp_path / "run" / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    again = html_report.load(tmp_path / "run" / "results.json")
    assert again == replace(result, machine=again.machine)
    assert again.machine["processes"] == 2
    assert "torch" in again.machine
    assert (tmp_path / "pages" / "out.html").read_text(encoding="utf-8") == html_report.page(again)
    assert str(tmp_path / "run") in text.getvalue()
    # A run without curves leaves none of an earlier one.
    report.publish(replace(bare(), settings=replace(settings, report=None)), Console(quiet=True))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["results.json"]


def test_figures_and_page_do_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(output=tmp_path, report=tmp_path / "out.html")
    text = io.StringIO()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report.publish(replace(RUNS["single"](), settings=settings), Console(file=text, width=1000))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.html", "results.json"]
    assert "no curves.png" in text.getvalue()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.12345, "0.123"),
        (0, "0.000"),
        (-2.0, "-2.000"),
        (1.5e-5, "1.5e-05"),
        (NAN, "–"),
        (math.inf, "–"),
        (None, "–"),
        ("x", "–"),
        (True, "–"),
    ],
)
def test_numbers(value: object, text: str) -> None:
    assert number(value) == text


def test_units() -> None:
    assert [percent(value) for value in (0.1234, 0.0, 1e-4, 1e-6, NAN)] == ["12.3%", "0.0%", "0.01%", "1e-06", "–"]
    found = [duration(value) for value in (0.0, 0.0054, 0.5, 9.96, 61.0, 119.7, 181.2, 3599.9, 3 * 3600 + 125, NAN)]
    assert found == [
        "0.0 s",
        "5.40 ms",
        "0.5 s",
        "10.0 s",
        "61 s",
        "120 s",
        "3 min 01 s",
        "59 min 59 s",
        "3 h 02 min",
        "–",
    ]
    assert [size(value) for value in (5, 2048, 3.5 * 2**20, 2**31, None)] == [
        "5 B",
        "2.00 KiB",
        "3.50 MiB",
        "2.00 GiB",
        "–",
    ]
    assert [times(3, 2), times(1, 0), times(None, 1)] == ["1.50x", "–", "–"]
    assert [worded(value) for value in (None, True, (1, "a"), {}, {"a": 1e-3})] == ["–", "yes", "1, a", "–", "a 0.001"]


def test_means_take_what_is_there() -> None:
    records: list[Record] = [{"kl": 1.0}, {}, {"kl": NAN}, {"kl": 3.0}]
    assert mean(records, "kl") == 2.0
    assert mean(records, "loss") is None
    stage = StageResult("", "", records=[{"loss": float(step)} for step in range(100)])
    assert ends(stage, "loss") == (4.5, 94.5)
    assert ends(replace(stage, records=stage.records[:3]), "loss") == (0.0, 2.0)
    assert ends(stage, "kl") == (None, None)
    assert rate([{"tokens": 10.0, "seconds": 2.0}, {"tokens": 5.0}], "seconds") == 5.0
    assert rate([{"tokens": 10.0, "seconds": 0.0}], "seconds") is None


RL_RECORD: Record = {
    **r1_results.rl_record(5, 10, 0.5),
    f"{WORDS}/accuracy": 0.25,
    "judge": 0.7,
    "kl": 0.01234,
}


def test_progress_shows_the_figures_of_a_step() -> None:
    text = "reward 0.780  sort 0.50  spell 0.25  judge 0.700  KL 0.012  17.1k tok/s"
    assert words(RL_RECORD) == text
    assert words(RL_RECORD, 30) == "reward 0.780  sort 0.50"
    assert words(RL_RECORD, 0) == ""
    sft: Record = {"loss": 0.5, f"{DIGITS}/accuracy": 0.75, "seconds": 0.5, "tokens": 1000.0}
    assert words(sft) == "loss 0.500  sort 0.75  2.0k tok/s"
    assert words({"loss": NAN}) == "loss –"
    assert words({}) == ""
    assert words("sampling [1]") == "sampling [1]"


def test_progress_off_a_terminal_is_a_line_now_and_then() -> None:
    text = io.StringIO()
    with progress_bar(Console(file=text, width=40), "cold [start]", 20) as step:
        for done in range(21):
            step(done, {"loss": 1.0})
    lines = text.getvalue().splitlines()
    assert lines[0] == "cold [start] 2/20  loss 1.000"
    assert lines[-1] == "cold [start] 20/20  loss 1.000"
    assert len(lines) == 10


@pytest.mark.parametrize("width", [20, 80, 200])
def test_progress_on_a_terminal_is_a_bar(width: int) -> None:
    text = io.StringIO()
    with progress_bar(Console(file=text, width=width, force_terminal=True), "RL", 10) as step:
        step(10, RL_RECORD)
    assert "10/10" in text.getvalue() or width == 20
    assert ("reward 0.780" in text.getvalue()) is (width >= 80)
    assert ("tok/s" in text.getvalue()) is (width == 200)


@pytest.mark.parametrize("terminal", [True, False])
def test_other_ranks_say_nothing(terminal: bool) -> None:
    text = io.StringIO()
    with progress_bar(Console(file=text, quiet=True, force_terminal=terminal), "RL", 1) as step:
        step(1, RL_RECORD)
    assert text.getvalue() == ""
