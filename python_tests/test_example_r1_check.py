"""The checks of the training example: what they run, and that each verdict can come out both ways."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

from examples.r1.checking import check
from examples.r1.checking.check import Results
from examples.r1.checking.jobs import Job, Verdicts, run_all
from examples.r1.choices import STAGES
from examples.r1.results import PipelineResult, StageResult
from examples.r1.settings import Settings
from python_tests.r1_results import DIGITS, WORDS, run

STARTING = {"seed-0", "seed-1", "seed-2", "moe", "mtp", "fp8", "sft-alone"}
NAMES = ["seed-0", "seed-1", "seed-2", "moe", "mtp", "fp8", "shuffled-rewards", "sft-alone", "weak-judge"]


def _result(digits: tuple[float, float], words: float = 1.0) -> PipelineResult:
    """Reasoning RL takes the sampled accuracy from the first number to the second; greedy ones end equal to it."""
    evaluations = [
        {f"{DIGITS}/accuracy": value, f"{DIGITS}/sampled_accuracy": value, f"{WORDS}/accuracy": words}
        for value in digits
    ]
    return PipelineResult(Settings(), 0, [StageResult("reasoning_rl", "", evaluations=evaluations)])


def _judged(judge: Callable[[Results, str, Verdicts], None], **results: PipelineResult) -> Verdicts:
    verdicts = Verdicts()
    judge(results, "own", verdicts)
    return verdicts


@pytest.mark.parametrize(
    ("digits", "words", "holds"),
    [
        ((0.3, 0.95), 0.95, [True, True, True]),
        ((0.3, 0.949), 0.95, [False, True, True]),
        ((0.3, 0.95), 0.949, [True, False, True]),
        ((0.86, 0.95), 1.0, [True, True, False]),
    ],
)
def test_a_run_learns_both_tasks_and_by_rewards(digits: tuple[float, float], words: float, holds: list[bool]) -> None:
    verdicts = _judged(check.learns, own=_result(digits, words))
    assert [row["holds"] for row in verdicts.as_json()] == holds
    assert verdicts.failed is not all(holds)
    console = Console(record=True, width=120, file=open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    verdicts.print(console, "check")
    text = console.export_text()
    assert f"{digits[0]:.3f} -> {digits[1]:.3f}" in text
    assert ("FAILED" in text) is not all(holds)


@pytest.mark.parametrize(("after", "holds"), [(0.1, True), (0.3, True), (0.301, False)])
def test_without_meaning_in_the_rewards_nothing_is_learnt(after: float, holds: bool) -> None:
    assert _judged(check.does_not_learn, own=_result((0.3, after))).failed is not holds


@pytest.mark.parametrize(("alone", "holds"), [(0.6, True), (0.86, False), (0.99, False)])
def test_imitation_stays_below_reinforcement(alone: float, holds: bool) -> None:
    judge = partial(check.stays_below, other="first")
    found = _judged(judge, own=_result((0.5, alone)), first=_result((0.3, 0.95)))
    assert found.failed is not holds
    assert found.as_json()[0]["found"] == f"{alone:.3f}, 0.950"


def test_a_weak_judge_is_hacked_and_a_good_one_is_not() -> None:
    hacked, good = (_judged(check.is_hacked, own=run(hacked=weak)) for weak in (True, False))
    assert not hacked.failed
    assert good.failed
    no_judge = run()
    no_judge.stages[-1] = replace(no_judge.stages[1], name="diverse_rl")
    assert _judged(check.is_hacked, own=no_judge).as_json()[0]["found"] == "no judge scored"


def test_a_run_without_the_stage_is_no_pass() -> None:
    with pytest.raises(ValueError, match="the run has no stage reasoning_rl"):
        _judged(check.does_not_learn, own=PipelineResult(Settings(), 0))


def test_every_check_is_a_run_of_its_own(tmp_path: Path) -> None:
    found = {item.name: item for item in check.all_checks(Settings(output=tmp_path), [0, 1, 2])}
    assert list(found) == NAMES
    assert {name for name, item in found.items() if item.settings.stages[0] == "cold_start"} == STARTING
    for name, item in found.items():
        settings = item.settings
        assert settings.output == tmp_path / name
        assert settings.report == tmp_path / name / "report.html"
        assert settings.start_from == (None if name in STARTING else tmp_path / "seed-0")
        assert settings.seed == {"seed-1": 1, "seed-2": 2}.get(name, 0)
    assert found["moe"].settings.model == found["fp8"].settings.model == "moe"
    assert found["fp8"].settings.recipe == "fp8_block128"
    assert found["mtp"].settings.mtp == 1
    learning = [item.judge for name, item in found.items() if item.judge is check.learns]
    assert len(learning) == 6


def test_controls_change_what_they_are_about(tmp_path: Path) -> None:
    found = {item.name: item.settings for item in check.all_checks(Settings(output=tmp_path, prompts=7), [4, 5])}
    shuffled, alone, weak = (found[name] for name in ("shuffled-rewards", "sft-alone", "weak-judge"))
    assert {settings.seed for settings in (shuffled, alone, weak)} == {4}
    assert {settings.prompts for settings in found.values()} == {7}
    assert shuffled.shuffle_rewards
    assert shuffled.stages == ("reasoning_rl",)
    assert shuffled.reasoning_rl_steps == check.CONTROL_STEPS
    assert shuffled.start_from == weak.start_from == tmp_path / "seed-4"
    assert weak.weak_judge
    assert weak.stages == ("reward_model", "diverse_rl")
    assert alone.stages == ("cold_start",)
    updates = Settings().reasoning_rl_steps * Settings().updates_per_rollout
    assert alone.cold_start_steps - Settings().cold_start_steps >= updates


def test_a_part_of_the_checks_brings_what_it_needs() -> None:
    checks = check.all_checks(Settings(), [0, 1, 2])
    for name, names in (
        ("moe", ["moe"]),
        ("weak-judge", ["seed-0", "weak-judge"]),
        ("sft-alone", ["seed-0", "sft-alone"]),
    ):
        assert [item.name for item in check.chosen(checks, [name])] == names
    options = check.parse_arguments(["--seeds", "3", "--only", "seed-3", "shuffled-rewards", "--jobs", "2"])
    assert (options.seeds, options.only, options.jobs) == ([3], ["seed-3", "shuffled-rewards"], 2)
    assert check.parse_arguments([]).only is None


def test_an_unknown_check_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        check.parse_arguments(["--only", "seed-7", "moe"])
    message = capsys.readouterr().err
    assert f"--only knows {', '.join(NAMES)}, got seed-7" in message


@pytest.mark.parametrize("weak", [False, True])
def test_the_command_trains_judges_and_writes(
    weak: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = []

    def noted(settings: Settings, console: Console) -> PipelineResult:
        trained.append(settings.output.name)
        return run(hacked=weak) if settings.weak_judge else run()

    monkeypatch.setattr(check, "train", noted)
    monkeypatch.setattr("sys.argv", ["check", "--output", str(tmp_path), "--only", "weak-judge", "--seeds", "0"])
    assert check.main() == (0 if weak else 1)
    assert trained == ["seed-0", "weak-judge"]
    written = json.loads((tmp_path / "check.json").read_text(encoding="utf-8"))
    assert written["failed"] is not weak
    assert [row["holds"] for row in written["verdicts"]] == [True, True, True, weak]
    assert written["machine"]["threads"] == 1
    assert ("FAILED" in capsys.readouterr().out) is not weak


@pytest.mark.slow
def test_controls_go_on_from_the_first_run(tmp_path: Path) -> None:
    steps = dict.fromkeys([f"{stage}_steps" for stage in STAGES], 1)
    tiny = Settings(
        output=tmp_path, threads=1, width=16, heads=2, sft_batch=8, prompts=4, group_size=4, rejection_prompts=4,
        rejection_group_size=2, judge_threshold=0.0, evaluation_prompts=8, save_every=0, **steps,
    )  # fmt: skip
    checks = [
        replace(item, settings=replace(item.settings, reasoning_rl_steps=1, cold_start_steps=1))
        for item in check.all_checks(tiny, [0])
        if item.name in ("seed-0", "shuffled-rewards", "sft-alone", "weak-judge")
    ]
    found = check.run_checks(checks, 1, Console(quiet=True)).as_json()
    assert [row["run"] for row in found] == ["seed-0"] * 3 + [item.name for item in checks[1:]]
    for item in checks:
        results = PipelineResult.from_json(json.loads((item.settings.output / "results.json").read_text()))
        assert tuple(stage.name for stage in results.stages) == item.settings.stages
        assert "<html" in (tmp_path / item.name / "report.html").read_text()
    shuffled, weak = (item.settings.output / "models" for item in (checks[1], checks[3]))
    assert sorted(path.name for path in shuffled.iterdir()) == ["reasoning_rl.safetensors"]
    assert sorted(path.name for path in weak.iterdir()) == ["diverse_rl.safetensors", "reward_model.safetensors"]


# side by side ----------------------------------------------------------------------------------------------------


def _write(settings: Settings, console: Console) -> int:
    console.print(f"seed {settings.seed}")
    settings.output.mkdir(parents=True)
    (settings.output / "seed").write_text(str(settings.seed))
    return settings.seed


def _read_the_first(settings: Settings, console: Console) -> int:
    assert settings.start_from is not None
    return 10 + int((settings.start_from / "seed").read_text())


@pytest.mark.parametrize("at_once", [1, 2])
def test_jobs_run_after_those_that_they_need(at_once: int, tmp_path: Path) -> None:
    text, kept = io.StringIO(), {}
    jobs = [
        Job("first", _write, Settings(seed=3, output=tmp_path / "first")),
        Job("second", _write, Settings(seed=4, output=tmp_path / "second")),
        Job("third", _read_the_first, Settings(start_from=tmp_path / "first"), after="first"),
    ]
    found = run_all(jobs, at_once, Console(file=text, width=120), kept.__setitem__)
    assert list(found.items()) == [("first", 3), ("second", 4), ("third", 13)]
    assert kept == found
    assert sorted(text.getvalue().split("\n")) == ["", "seed 3", "seed 4"]


def _fail(settings: Settings, console: Console) -> int:
    raise ValueError("this one fails")


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_job_that_fails_is_told(at_once: int) -> None:
    jobs = [Job("first", _fail, Settings()), Job("second", _read_the_first, Settings(), after="first")]
    with pytest.raises(ValueError, match="this one fails"):
        run_all(jobs, at_once, Console(quiet=True))


def test_the_order_is_checked() -> None:
    with pytest.raises(ValueError, match="second reads the folder of first, which must be run before it"):
        run_all([Job("second", _write, Settings(), after="first")], 1, Console(quiet=True))
