"""The table of combinations: what is run, what need not be run again, and what the page says of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from examples.r1.checking import combinations_page, sweep
from examples.r1.choices import PRESETS
from examples.r1.command_line import parse_arguments
from examples.r1.results import PipelineResult
from examples.r1.settings import Settings
from python_tests.r1_results import run


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the folders that were trained in, in no time."""
    folders: list[str] = []

    def noted(settings: Settings, console: Console) -> PipelineResult:
        folders.append(settings.output.name)
        (settings.output / "models").mkdir(parents=True, exist_ok=True)
        result = run(moe=settings.model == "moe", drafts=settings.mtp > 0)
        result.stages = [stage for stage in result.stages if stage.name in settings.stages]
        return result

    monkeypatch.setattr(sweep.demo, "run", noted)
    return folders


def _sweep(tmp_path: Path, only: Sequence[str] = sweep.NAMES, **changes: Any) -> dict[str, Any]:
    found = sweep.combinations(Settings(output=tmp_path / "runs", **changes))
    wanted = [combination for combination in found if combination.name in (*only, sweep.BASE)]
    return sweep.run_missing(tmp_path / "results" / "r1.json", wanted, 1, Console(quiet=True))


def test_every_model_and_every_loss_is_there(tmp_path: Path) -> None:
    found = {item.name: item for item in sweep.combinations(Settings(output=tmp_path))}
    assert tuple(found) == sweep.NAMES
    assert {f"--preset {preset}" for preset in PRESETS} <= set(found)
    assert len({item.settings.output for item in found.values()}) == len(found)
    for item in found.values():
        whole = item.settings.stages == Settings().stages
        assert item.after == (None if whole else "dense")
        assert item.settings.start_from == (None if whole else tmp_path / "dense")
        assert whole or item.settings.stages == ("reasoning_rl",)
    model = found["--model moe --recipe fp8_block128_wgrad"].settings
    assert (model.model, model.recipe, model.mtp) == ("moe", "fp8_block128_wgrad", 0)
    assert found["--mtp 2"].settings.mtp == 2
    assert found["--preset gspo"].settings.preset == "gspo"
    assert found["--dynamic-sampling 1"].settings.dynamic_sampling == 1
    assert found["--aggregation sum_then_normalize"].settings.aggregation == "sum_then_normalize"


@pytest.mark.parametrize("name", sweep.NAMES)
def test_a_name_is_what_the_command_line_takes(name: str, tmp_path: Path) -> None:
    settings = {item.name: item.settings for item in sweep.combinations(Settings(output=tmp_path))}[name]
    parsed = parse_arguments([] if name == sweep.BASE else name.split())
    placed = {"stages": settings.stages, "start_from": settings.start_from, "save_every": 0}
    assert replace(parsed, output=settings.output, **placed) == settings


def test_what_is_known_is_not_run_again(tmp_path: Path, trained: list[str]) -> None:
    rows = _sweep(tmp_path, ["--model moe"])
    assert trained == ["dense", "model-moe"]
    assert json.loads((tmp_path / "results" / "r1.json").read_text())["combinations"] == rows
    assert _sweep(tmp_path, ["--model moe", "--preset gspo"]) == sweep.load(tmp_path / "results" / "r1.json")
    assert trained[2:] == ["preset-gspo"]
    _sweep(tmp_path, ["--preset gspo"], kl_coef=0.5)
    assert trained[3:] == ["dense", "preset-gspo"]
    (tmp_path / "runs" / "dense" / "models").rmdir()  # results are kept, folders are not
    _sweep(tmp_path, ["--mtp 1"], kl_coef=0.5)
    assert trained[5:] == ["mtp-1"]
    _sweep(tmp_path, ["--preset dapo"], kl_coef=0.5)
    assert trained[6:] == ["dense", "preset-dapo"]
    assert list(sweep.load(tmp_path / "results" / "r1.json")) == [
        name for name in sweep.NAMES if name in ("dense", "--model moe", "--mtp 1", "--preset gspo", "--preset dapo")
    ]


def test_the_page_shows_what_was_run(tmp_path: Path, trained: list[str]) -> None:
    rows = _sweep(tmp_path, ["--mtp 1", "--preset gspo"])
    page = combinations_page.between_markers(f"# A\n{combinations_page.BEGIN}\nearlier\n{combinations_page.END}\nB\n",
                                             combinations_page.text(rows))  # fmt: skip
    assert page.startswith("# A\n")
    assert page.endswith(f"\n{combinations_page.END}\nB\n")
    assert "earlier" not in page
    assert f"PyTorch {rows['dense']['machine']['torch']}, one thread a run." in page
    after = rows["--mtp 1"]["stages"]["diverse_rl"]["after"]
    lines = page.splitlines()
    (model,) = (line for line in lines if line.startswith("| `--mtp 1` |"))
    cell = f"{after['digit_sorting/accuracy']:.3f} / {after['spell_backward/accuracy']:.3f}"
    assert model.split(" | ")[-1] == f"{cell} |"
    (loss,) = (line for line in lines if line.startswith("| `--preset gspo` |"))
    end = rows["--preset gspo"]["stages"]["reasoning_rl"]["end"]
    assert f"| {end['kl']:.3f} | {end['ratio_max']:.2f} | {end['clip_fraction']:.1%} |" in loss
    assert all(line.count("|") == lines[index - 1].count("|") for index, line in enumerate(lines) if "| ---" in line)


@pytest.mark.parametrize("markers", [[], [combinations_page.BEGIN], [combinations_page.BEGIN] * 2])
def test_a_page_without_the_markers_is_told(markers: list[str]) -> None:
    with pytest.raises(ValueError, match="the page needs one line"):
        combinations_page.between_markers("\n".join(markers), "text")


def test_the_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = sweep.parse_arguments(["--only", "--model moe", "--preset gspo", "--jobs", "2", "--write"])
    assert (options.only, options.jobs, options.write) == (["--model moe", "--preset gspo"], 2, True)
    assert options.results.parent == sweep.ROOT / "bench" / "results"
    assert options.results.name.startswith("r1-cpu-")
    with pytest.raises(SystemExit):
        sweep.parse_arguments(["--only", "--preset nothing"])
    assert "'--preset gspo'" in capsys.readouterr().err
