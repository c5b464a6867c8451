"""Curves and page of examples.r1, and its watch on the judge, of made-up runs: nothing is trained here."""

from __future__ import annotations

import ast
import io
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from examples.r1.reporting import curves, html_report, judge_watch, panels, report, svg_chart
from examples.r1.reporting.judge_watch import judge_is_hacked
from examples.r1.results import PipelineResult, Record, StageResult
from examples.r1.saving.storage import save_json
from python_tests import r1_results
from python_tests.r1_results import NAN, RUNS, WORDS, bare, broken, full, model_states

every_run = pytest.mark.parametrize("make", RUNS.values(), ids=RUNS)


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
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


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
    for path in Path(curves.__file__).parents[1].rglob("*.py"):
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
        "44.4%",
        "sampling with drafts",
        "Busiest expert over the mean",
        "583 of 600, 97.2%",
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
    result.ppo = model_states(evil, device=evil)
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
    report.show(result, Console(file=io.StringIO()))


def test_the_page_is_made_again_from_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "results.json", tmp_path / "out.html"
    save_json(source, full().as_json())
    assert html_report.main([str(source), str(target)]) == 0
    assert target.read_text(encoding="utf-8") == html_report.page(full())
    assert html_report.main([str(tmp_path / "missing.json"), str(target)]) == 2
    assert "missing.json" in capsys.readouterr().err
    wrong_ppo = '{"stages": [], "ppo": {"ppo": 5}}'
    wrong_stages = ('{"stages": [3]}', '{"stages": [{}]}', '{"stages": [{"name": "a", "steps": "x"}]}')
    for text in ("{", "[]", "{}", *wrong_stages, wrong_ppo):
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
