"""`python -m bench.scaling`: sweeps of the benchmarks' cases, their growth, record, pictures and page."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import docs_scaling, machine, memory
from bench.case import Case, Inputs, Provider
from bench.measure import Effort
from bench.progress import Progress
from bench.scaling import __main__ as command
from bench.scaling import growth, measure, plot, rank_definitions, ranks, sweeps
from bench.scaling.sweeps import Sweep
from python_tests.distributed.launch import run as run_ranks

SHORT = Effort(seconds=0.0, minimum_rounds=2, maximum_rounds=2)


def _points(provider: str, values: dict[int, float], field: str = "median_us") -> list[dict[str, Any]]:
    return [{"size": size, "rows": {provider: {"kind": "ours", field: value}}} for size, value in values.items()]


def test_slopes_are_exponents_of_the_upper_half() -> None:
    squares = {size: 3.0 * size**2 for size in (1, 2, 4, 8)}
    assert growth.slope(_points("ours", squares), "ours", "median_us") == pytest.approx(2.0)
    late = {1: 100.0, 2: 100.0, 4: 100.0, 8: 200.0, 16: 400.0}  # what is fixed hides the growth at first
    assert growth.slope(_points("ours", late), "ours", "median_us") == pytest.approx(1.0)
    assert growth.slope(_points("ours", {1: 1.0, 2: 2.0}), "ours", "median_us") == pytest.approx(1.0)
    assert growth.slope(_points("ours", {1: 1.0, 2: 0.0}), "ours", "median_us") is None
    assert growth.slope(_points("ours", squares), "eager", "median_us") is None
    assert growth.series(_points("ours", {1: 0.0, 2: 5.0}), "ours", "median_us") == ([2], [5.0])


def test_sweeps_change_one_size_of_cases_that_compare_ours_with_eager() -> None:
    found = sweeps.of(tuple(sweeps.OPS))
    assert {(sweep.op, sweep.axis) for sweep in found} == {
        ("token_log_probs", "N"), ("token_log_probs", "V"), ("linear_grpo_loss", "N"), ("linear_grpo_loss", "V"),
        ("linear_grpo_loss", "H"), ("grpo_loss", "T"), ("grpo_loss", "B"), ("group_advantages", "groups"),
        ("moe_router", "T"), ("moe_router", "E"), ("build_permutation", "T"), ("build_permutation", "E"),
        ("moe_permute", "T"), ("moe_permute", "E"), ("moe_experts", "T"), ("moe_experts", "E"),
    }  # fmt: skip
    for sweep in found:
        assert len(sweep.sizes) >= 4
        assert list(sweep.sizes) == sorted(set(sweep.sizes))
        kinds = {provider.kind for provider in sweep.case(sweep.sizes[0]).providers}
        assert kinds == ({"ours", "eager", "compile"} if sweep.compiled else {"ours", "eager"}), sweep
    drawn = {op for _, _, ops in plot.FIGURES for op in ops}
    assert drawn == {sweep.op for sweep in found} | set(rank_definitions.PROVIDERS)


@pytest.mark.parametrize(
    ("op", "axis", "tensor", "dimension"),
    [
        ("token_log_probs", "V", "logits", 2),
        ("linear_grpo_loss", "V", "weight", 0),
        ("linear_grpo_loss", "H", "weight", 1),
        ("grpo_loss", "T", "log_probs", 1),
        ("grpo_loss", "B", "log_probs", 0),
        ("moe_router", "T", "logits", 0),
        ("moe_router", "E", "logits", 1),
        ("build_permutation", "T", "ids", 0),
        ("moe_permute", "T", "rows", 0),
        ("moe_experts", "E", "gate_up", 0),
    ],
)
def test_the_size_is_that_of_the_inputs(op: str, axis: str, tensor: str, dimension: int) -> None:
    (sweep,) = (sweep for sweep in sweeps.of([op]) if sweep.axis == axis)
    size = sweep.sizes[0]
    assert sweep.case(size).make("cpu", "full")[tensor].shape[dimension] == size


# --- a run -----------------------------------------------------------------------------------------------------------


def _case(size: int) -> Case:
    def right(inputs: Inputs) -> tuple[torch.Tensor]:
        return (inputs["x"] * 2,)

    def raising(inputs: Inputs) -> tuple[torch.Tensor]:
        raise RuntimeError("no")

    providers = [("ours", "ours"), ("eager", "eager"), ("peer", "peer"), ("torch.compile", "compile")]
    made = tuple(Provider(name, raising if kind == "peer" else right, kind) for name, kind in providers)
    return Case("group_advantages", f"n={size}", lambda device, _: {"x": torch.ones(size)}, made)


def _sweeps() -> Iterator[Sweep]:
    yield Sweep("group_advantages", "n", "numbers", "nothing else", (8, 16, 32), _case, compiled=True, memory=True)
    yield Sweep("group_advantages", "m", "more", "the rest", (8, 16), _case)


@dataclasses.dataclass(frozen=True)
class _Ranks:
    op: str = rank_definitions.HEAD
    axis: str = "ranks"
    what: str = "ranks"
    fixed: str = "all"
    sizes: tuple[int, ...] = (1, 2)

    def measure(self, progress: Progress) -> list[dict[str, Any]]:
        rows = {"ours": {"kind": "ours", "median_us": 5.0}, "eager": {"kind": "eager", "median_us": 20.0}}
        return [{"size": size, "rows": rows} for size in self.sizes]


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """Of tiny sweeps."""

    def peaks(op: str, provider: str, names: list[str], size: str, cases: str) -> tuple[dict[str, int], str]:
        assert cases == "scaling.sweeps"
        assert provider in ("ours", "eager")
        return {name: 2**20 * int(name[2:]) * (1 if provider == "ours" else 4) for name in names}, ""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "peaks_in_new_process", peaks)
        return measure.run(list(_sweeps()), (_Ranks(),), Progress(), SHORT)


@pytest.fixture
def results(measured: dict[str, Any]) -> dict[str, Any]:
    """A copy that a test may change."""
    return copy.deepcopy(measured)


def test_a_run_measures_every_size_of_every_sweep(results: dict[str, Any]) -> None:
    assert results["kind"] == "scaling"
    assert {"device", "torch", "threads", "load_average"} <= set(results["machine"])
    first, second, over_ranks = results["sweeps"]
    assert [point["size"] for point in first["points"]] == [8, 16, 32]
    assert set(first["points"][0]["rows"]) == {"ours", "eager", "torch.compile"}
    assert set(second["points"][0]["rows"]) == {"ours", "eager"}
    assert all(row["median_us"] > 0 for sweep in (first, second) for p in sweep["points"] for row in p["rows"].values())
    assert [point["rows"]["eager"]["extra_bytes"] for point in first["points"]] == [2**25, 2**26, 2**27]
    assert "extra_bytes" not in first["points"][0]["rows"]["torch.compile"]
    assert "extra_bytes" not in second["points"][0]["rows"]["ours"]
    assert over_ranks["axis"] == "ranks"


def test_a_failed_process_leaves_its_figures_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "peaks_in_new_process", lambda *arguments: ({}, "exit status 1"))
    (first, *_) = measure.run(list(_sweeps())[:1], (), Progress(), SHORT)["sweeps"]
    assert "extra_bytes" not in first["points"][0]["rows"]["ours"]


def test_the_page_and_the_pictures(results: dict[str, Any], monkeypatch, tmp_path: Path) -> None:
    figures = (("one", "The one", ("group_advantages",)), ("none", "None", ("nothing",)))
    monkeypatch.setattr(plot, "FIGURES", figures)
    assert plot.draw(results, tmp_path) == [tmp_path / "scaling_one.png"]
    assert (tmp_path / "scaling_one.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(docs_scaling, "IMAGES", tmp_path)
    for point, times in zip(results["sweeps"][0]["points"], ((1.0, 2.0), (2.0, 6.0), (4.0, 16.0)), strict=True):
        point["rows"]["ours"]["median_us"], point["rows"]["eager"]["median_us"] = times
    lines = docs_scaling.text({"scaling-toaster.json": results}).splitlines()
    first = "| `group_advantages`: numbers; nothing else | 8 to 32 | 1 us to 4 us | 1.00 | 1.42 | 2.0x to 4.0x | "
    assert first + "1.00 | 1.00 | 4.0x |" in lines
    assert any("](images/scaling_one.png)" in line for line in lines)
    del results["sweeps"][0]["points"][-1]["rows"]["ours"]["median_us"]
    lines = docs_scaling.text({"scaling-toaster.json": results}).splitlines()
    assert any("| 8 to 16 | 1 us to 2 us | 1.00 | 1.58 | 2.0x to 3.0x | " in line for line in lines)
    assert not any("scaling_none.png" in line for line in lines)
    assert docs_scaling.text({}) == "No machine has been measured yet."


def test_panels_are_logarithmic_and_say_how_steep_the_lines_are(results: dict[str, Any]) -> None:
    for point in results["sweeps"][0]["points"]:
        for row in point["rows"].values():
            row["median_us"] = 10.0 * point["size"] ** 2
    made = plot.figure(results["sweeps"][:1], "title", results["machine"])
    time_axes, memory_axes = made.axes
    assert (time_axes.get_xscale(), time_axes.get_yscale()) == ("log", "log")
    assert (time_axes.get_ylabel(), memory_axes.get_ylabel()) == ("time, ms", "peak memory, MiB")
    assert sorted(t.get_text() for t in time_axes.texts) == ["2.00", "2.00", "2.00", "nothing else"]
    colors = {line.get_color() for line in time_axes.lines if line.get_marker() != "None"}
    assert colors == {plot.COLORS[name] for name in ("ours", "torch.compile", "eager")}
    without = plot.figure(results["sweeps"][1:2], "title", results["machine"])
    assert len(without.axes) == 1


def test_the_command_records_and_draws(results: dict[str, Any], monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr(machine, "pages_are_recycled", lambda: True)
    monkeypatch.setattr(ranks, "SWEEPS", (_Ranks(),))
    monkeypatch.setattr(sweeps, "OPS", {"tiny": _sweeps})
    monkeypatch.setattr(command.measure, "EFFORT", SHORT)
    monkeypatch.setattr(
        command.measure, "run", lambda found, over, progress: {**results, "asked": [len(found), len(over)]}
    )
    path, pictures = tmp_path / "a.json", tmp_path / "pictures"
    monkeypatch.setattr("sys.argv", ["bench.scaling", "--save", str(path), "--plot", str(pictures)])
    assert command.main() == 0
    assert json.loads(path.read_text())["asked"] == [2, 1]
    assert {picture.name for picture in pictures.iterdir()} == {"scaling_losses.png", "scaling_ranks.png"}
    monkeypatch.setattr("sys.argv", ["bench.scaling", "--results", str(path), "--plot", str(tmp_path / "again")])
    assert command.main() == 0
    assert len(list((tmp_path / "again").iterdir())) == 2
    assert "drawn: " in capsys.readouterr().out


# --- ranks -----------------------------------------------------------------------------------------------------------


def _all_providers_agree(rank: int, world: int) -> list[str]:
    d = rank_definitions
    d._ROWS, d._WIDTH, d._VOCAB, d._TOKENS, d._HIDDEN, d._EXPERTS, d._TOP_K = 6, 5, 24, 16, 3, 8, 2
    checked = []
    for op, providers in d.PROVIDERS.items():
        given = d.inputs(op, rank, world)
        found = {name: run(given) for name, (_, run) in providers.items()}
        assert all(value.abs().sum() > 0 for values in found.values() for value in values)
        ranks._check(found)
        wrong = {**found, "wrong": tuple(value * 1.01 for value in found["ours"])}
        with pytest.raises(AssertionError):
            ranks._check(wrong)
        checked.append(op)
    return checked


@pytest.mark.slow
def test_what_is_compared_over_ranks_computes_the_same() -> None:
    for found in run_ranks(2, _all_providers_agree):
        assert found == [rank_definitions.HEAD, rank_definitions.DISPATCH]


def test_ranks_that_fail_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"time": ({"ours": {"median_us": 1.0}}, ""), "memory": ({}, "exit status 1: no")}
    monkeypatch.setattr(ranks, "_in_new_process", lambda what, op, world, tunables: figures[what])
    (point,) = ranks.RankSweep(rank_definitions.HEAD, "", sizes=(2,)).measure(Progress())
    assert point["rows"]["ours"] == {"kind": "ours", "median_us": 1.0}
    assert point["error"] == "exit status 1: no"
