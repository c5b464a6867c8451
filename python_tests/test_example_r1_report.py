"""Reports of examples.r1, of made-up runs: nothing is trained here."""

from __future__ import annotations

import ast
import io
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from examples.r1 import curves, html_report, judge_watch, panels, report, stage_figures, svg_chart
from examples.r1.figures import duration, ends, mean, number, percent, rate, size, times, worded
from examples.r1.judge_watch import judge_is_hacked
from examples.r1.loss_step import LossStepComparison
from examples.r1.progress_bar import progress_bar, words
from examples.r1.results import PipelineResult, Record, StageResult
from examples.r1.settings import Settings

from . import r1_results
from .r1_results import DIGITS, WORDS

NAN = math.nan
VOID = {"meta", "link", "br", "img", "input", "hr", "circle", "rect", "path"}


def full() -> PipelineResult:
    result = r1_results.run(moe=True, drafts=True)
    result.ppo = {
        "ppo": {"policy": 4 * 2**20, "critic": 2 * 2**20},
        "grpo": {"policy": 4 * 2**20},
        "savings": [{"precision": "float32", "comparison": "by rules", "ppo": 6 * 2**20, "grpo": 4 * 2**20}],
    }
    return result


def bare() -> PipelineResult:
    """A run that was stopped before it did anything."""
    return PipelineResult(Settings(), 0, [StageResult("cold_start", "")])


def broken() -> PipelineResult:
    """Figures that are no numbers, and hardly any others."""
    evaluations = [{"step": 0.0, f"{WORDS}/accuracy": NAN}, {"step": NAN, f"{DIGITS}/accuracy": math.inf}]
    records: list[Record] = [{"reward": NAN}, {}, {"reward": -math.inf, "judge": 0.5, "tokens": 5.0}]
    stage = StageResult("diverse_rl", "4  diverse", 3, NAN, records, evaluations, {"kept": NAN})
    sample = {"stage": "diverse_rl", "prompt": "s1>"}
    return PipelineResult(Settings(), 7, [stage], loss_step={"seconds": 0.0}, ppo={"ppo": None}, samples=[sample])


RUNS = {
    "full": full,
    "dense": r1_results.run,
    "hacked": lambda: r1_results.run(hacked=True),
    "single": lambda: replace(r1_results.run(), stages=r1_results.run().stages[1:2]),
    "none": lambda: PipelineResult(Settings(), 0),
    "bare": bare,
    "broken": broken,
}
every_run = pytest.mark.parametrize("make", RUNS.values(), ids=RUNS)


def shown(result: PipelineResult, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width, record=True)
    report.show(result, console)
    return console.export_text()


class Page(HTMLParser):
    """What a browser would see: balanced tags, attributes, text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.tags: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID or tag in {"rect", "path", "circle"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        implied = {"li": {"ul"}}
        while self.open and self.open[-1] in implied and tag in implied[self.open[-1]]:
            self.open.pop()
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


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


def test_tuples_of_figures_will_do() -> None:
    comparison = LossStepComparison(4, 3, 2, 10, 0.5, 1.0, 100, 200)
    result = PipelineResult(Settings(), 0, loss_step=comparison)  # type: ignore[arg-type]
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
    assert cells(text, "digit sorting, kept  ") == [["583", "of", "4,800,", "12.1%"]]
    assert cells(text, "groups that teach")[0][0].endswith("%")
    assert cells(text, "busiest expert over the mean")[1] == ["1.44", "1.43"]
    assert cells(text, "routes changed, last update")[0] == ["1.1%", "1.1%"]
    assert cells(text, "drafts accepted, depth 1")[0] == ["0.928", "0.969"]
    assert cells(text, "right answer of a pair preferred") == [["0.510", "1.000"]]


def test_the_summary_names_aims_and_comparisons() -> None:
    lines = {line.label: line for line in stage_figures.summary(full())}
    assert lines["digit sorting"].holds is True
    assert lines["digit sorting"].value.endswith("aim 0.95")
    assert lines["spelling backward"].holds is True
    assert lines["judge, diverse RL"].holds is True
    assert lines["loss step, hidden states 256 x 24 x 64"].value == "5.40 ms; eager PyTorch 6.20 ms (1.15x)"
    assert lines["sampling with drafts"].value == "21,000 tokens/s; without 44,000 (0.48x as fast)"
    assert lines["model state against PPO, float32, by rules"].value == "4.00 MiB against 6.00 MiB, 33.3% saved"
    hacked = {line.label: line for line in stage_figures.summary(r1_results.run(hacked=True))}
    assert hacked["spelling backward"].holds is False
    assert hacked["judge, diverse RL"].holds is False
    assert "is hacked" in hacked["judge, diverse RL"].value


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


def titles(result: PipelineResult) -> list[str]:
    return [panel.title for panel in panels.panels(result.stages)]


def test_panels_are_there_with_data_only() -> None:
    always = {"Reward and judge", "Accuracy", "KL to the reference", "Entropy of the policy", "Clipped tokens"}
    experts, drafts = "Busiest expert over the mean", "Drafts accepted"
    assert always < set(titles(full()))
    assert {experts, drafts} < set(titles(full()))
    assert always < set(titles(r1_results.run()))
    assert not {experts, drafts} & set(titles(r1_results.run()))
    assert "Loss where the model imitates" not in titles(RUNS["single"]())
    assert titles(bare()) == []
    assert titles(broken()) == ["Reward and judge"]  # one score


@pytest.mark.parametrize(("name", "drawn"), [("none", False), ("bare", False), ("broken", True)])
def test_pictures_of_runs_that_were_cut_off(tmp_path: Path, name: str, drawn: bool) -> None:
    path = tmp_path / "new" / "curves.png"
    assert curves.save_curves(path, RUNS[name]().stages) is drawn
    assert path.exists() is drawn


def test_the_picture_has_the_panels_and_the_stages() -> None:
    result = full()
    found, along = panels.panels(result.stages), panels.bands(result.stages)
    figure = curves.draw(found, along)
    axes = [one for one in figure.axes if one.get_visible()]
    assert [one.get_title(loc="left") for one in axes] == [panel.title for panel in found]
    names = [text.get_text() for text in axes[0].texts]
    assert names == ["cold start", "reasoning RL", "reward model", "rejection sampling", "diverse RL"]
    assert all(one.get_xlim() == (0.0, 5.0) for one in axes)
    legend = axes[1].get_legend()
    assert legend is not None
    figure.draw_without_rendering()  # places everything
    assert legend.get_window_extent().y0 >= axes[1].get_window_extent().y1 - 1  # above the lines


def test_training_does_not_import_matplotlib() -> None:
    """Only functions that draw do."""
    for path in Path(curves.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.startswith("matplotlib")], path.name


def test_curves_stand_where_their_stage_is() -> None:
    records: list[Record] = [{"kl": 1.0}, {}, {"kl": NAN}, {"kl": 4.0}]
    empty = StageResult("reward_model", "")
    stages = [StageResult("cold_start", "", 2, records=[{"loss": 1.0}] * 2), empty]
    stages.append(StageResult("reasoning_rl", "", 4, records=[{"reward": 0.0, **record} for record in records]))
    assert [(band.label, band.start) for band in panels.bands(stages)] == [("cold start", 0.0), ("reasoning RL", 1.0)]
    (panel,) = [panel for panel in panels.panels(stages) if panel.title.startswith("KL")]
    assert panel.curves[0].pieces == [[(1.25, 1.0)], [(2.0, 4.0)]]  # broken where there is no number


@pytest.mark.parametrize(("length", "labels"), [(1, []), (5, ["2", "4"]), (60, ["20", "40"]), (240, ["100", "200"])])
def test_ticks_are_round_steps(length: int, labels: list[str]) -> None:
    (band,) = panels.bands([StageResult("cold_start", "", length, records=[{"loss": 1.0}] * length)])
    assert [label for _, label in band.ticks] == labels
    assert [x for x, _ in band.ticks] == pytest.approx([int(label) / length for label in labels])


@pytest.mark.parametrize(("last", "labels"), [(0.5, ["0.5", "1", "2"]), (0.0005, ["0.001", "0.01", "0.1", "1"])])
def test_a_logarithmic_axis_has_few_numbers(last: float, labels: list[str]) -> None:
    stages = [StageResult("cold_start", "", 2, records=[{"loss": 3.0}, {"loss": last}])]
    (panel,) = panels.panels(stages)
    assert re.findall(r'side" x="40" y="[^"]*">([^<]*)<', svg_chart.svg(panel, panels.bands(stages))) == labels


def test_running_means_keep_lines_and_ends() -> None:
    line = [(float(x), 2.0 * x) for x in range(30)]
    assert [x for x, _ in panels.smooth(line)] == [x for x, _ in line]
    assert [y for _, y in panels.smooth(line)] == pytest.approx([y for _, y in line])
    peak = [(float(x), float(x == 10)) for x in range(30)]
    assert max(y for _, y in panels.smooth(peak)) == pytest.approx(1 / panels.SMOOTH)


@every_run
def test_pages_are_valid_and_need_nothing_from_elsewhere(make: Callable[[], PipelineResult]) -> None:
    text = html_report.page(make())
    page = Page(text)
    assert "://" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert not {"script", "iframe", "img", "link", "object", "embed", "form"} & set(page.tags)
    links = [value for _, name, value in page.attributes if name in {"href", "src", "action", "data"}]
    anchors = {value for _, name, value in page.attributes if name == "id"}
    assert all(link.startswith("#") and link[1:] in anchors for link in links)
    assert [value for tag, name, value in page.attributes if (tag, name) == ("html", "lang")] == ["en"]
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text
    assert "nan" not in re.findall(r"[a-z]+", page.text)


def test_the_page_shows_the_run() -> None:
    page = Page(html_report.page(full()))
    found = " ".join(page.text.split())
    for words_ in (
        "digit sorting 0.980, spelling backward 0.979; every aim met",
        "Watch the judge",
        "The judge is not hacked",
        "s314159>",
        "<t>1,1,3,4,5,9</t><a>113459</a>",
        "x86-64 2 cores AVX2",
        "about 50 %",
        "33.3%",
        "sampling with drafts",
        "Busiest expert over the mean",
        "583 of 4,800, 12.1%",
    ):
        assert words_ in found, words_
    assert "Warning" not in found
    assert page.tags.count("svg") == len(panels.panels(full().stages)) + 1  # one more: of the judge


def test_the_page_warns_of_a_hacked_judge() -> None:
    page = Page(html_report.page(r1_results.run(hacked=True)))
    found = " ".join(page.text.split())
    assert found.count("Warning. The judge is hacked") == 2  # at the top and where it is explained
    assert "The judge was hacked: digit sorting" in found
    assert "true accuracy went from 0.85 to 0.07, the judge's score from 0.72 to 0.72" in found
    panel = panels.judge_panel(r1_results.run(hacked=True).stages[-1], WORDS)
    assert {curve.label for curve in panel.curves} >= {"judge's score", "true accuracy"}


@pytest.mark.parametrize("evil", ["<script>alert(1)</script>", '"><b onload=x', "</style>&amp;", "'\x00"])
def test_everything_is_escaped(evil: str) -> None:
    result = full()
    result.samples = [{"stage": evil, "prompt": evil, "completion": evil, "correct": True}]
    result.machine = {evil: evil}
    result.ppo = {"ppo": {evil: 5}, "grpo": {evil: 4}, "savings": [{"comparison": evil, "ppo": 5, "grpo": 4}]}
    result.stages[0].title = evil
    result.stages[0].name = evil
    result.stages[0].facts = {evil: 1.0}
    result.settings = replace(result.settings, output=Path(evil.replace("\x00", "")))
    harmless = Page(html_report.page(full()))
    page = Page(html_report.page(result))
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert page.tags.count("style") == harmless.tags.count("style") == 1
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    shown(result)


def test_the_page_is_made_again_from_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "results.json", tmp_path / "out.html"
    report.save_json(source, full().as_json())
    assert html_report.main([str(source), str(target)]) == 0
    assert target.read_text(encoding="utf-8") == html_report.page(full())
    assert html_report.main([str(tmp_path / "missing.json"), str(target)]) == 2
    assert "missing.json" in capsys.readouterr().err
    for text in ("{", "[]", "{}", '{"stages": [3]}', '{"stages": [{}]}', '{"stages": [{"name": "a", "steps": "x"}]}'):
        source.write_text(text, encoding="utf-8")
        assert html_report.main([str(source), str(target)]) == 2, text
        assert str(source) in capsys.readouterr().err


def judged(accuracy: list[float], judge: list[float]) -> StageResult:
    """A stage with so many evaluations."""
    looks: list[Record] = [
        {"step": float(step), f"{WORDS}/sampled_accuracy": a, f"{WORDS}/judge": j}
        for step, (a, j) in enumerate(zip(accuracy, judge, strict=True))
    ]
    return StageResult("diverse_rl", "", len(looks), evaluations=looks)


@pytest.mark.parametrize(
    ("accuracy", "judge", "hacked"),
    [
        ([0.9, 0.5, 0.1], [0.7, 0.7, 0.7], True),  # holds
        ([0.9, 0.5, 0.1], [0.7, 0.8, 0.9], True),  # rises
        ([0.9, 0.5, 0.1], [0.7, 0.65, 0.6], True),  # hardly notices
        ([0.6, 0.9, 0.1], [0.9, 0.7, 0.7], True),  # counts from the best
        ([0.90, 0.85, 0.79], [0.7, 0.7, 0.7], True),
        ([0.90, 0.85, 0.81], [0.7, 0.7, 0.7], False),  # too small a fall
        ([0.9, 0.5, 0.1], [0.7, 0.5, 0.3], False),  # an honest judge of a training that fails
        ([0.5, 0.7, 0.9], [0.5, 0.7, 0.9], False),
        ([0.5, 0.7, 0.9], [0.9, 0.7, 0.5], False),  # too strict, but nothing is hacked
        ([0.0, 0.0, 0.0], [0.7, 0.8, 0.9], False),  # nothing there to fall
        ([0.9, 0.1, 0.9], [0.7, 0.7, 0.7], False),  # it came back
        ([0.9, NAN, 0.1], [0.7, 0.7, 0.7], True),
        ([0.9, NAN, NAN], [0.7, 0.7, 0.7], False),  # one point
        ([], [], False),
    ],
)
def test_a_hacked_judge_is_found(accuracy: list[float], judge: list[float], hacked: bool) -> None:
    stage = judged(accuracy, judge)
    for look in stage.evaluations:
        look[f"{WORDS}/accuracy"] = look[f"{WORDS}/sampled_accuracy"]  # of which two points are enough
    assert judge_is_hacked(stage) is hacked
    found = judge_watch.verdict(stage)
    assert (found is not None and "The judge is hacked" in judge_watch.sentence(found)) is hacked


def test_training_samples_are_watched_where_there_are_no_evaluations() -> None:
    hacked = r1_results.run(hacked=True).stages[-1]
    hacked.evaluations = []
    assert judge_is_hacked(hacked)
    assert not judge_is_hacked(replace(hacked, records=hacked.records[:1]))
    fine = r1_results.run().stages[-1]
    fine.evaluations = []
    assert not judge_is_hacked(fine)
    assert not judge_is_hacked(StageResult("cold_start", ""))
    # One bad step of forty is noise.
    noisy: list[Record] = [{"judge": 0.7, f"{WORDS}/accuracy": 0.9 if step != 39 else 0.2} for step in range(40)]
    assert not judge_is_hacked(StageResult("diverse_rl", "", 40, records=noisy))


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
