"""`grpo-kernels bench`: its options, comparisons, pictures, and that a wheel carries it."""

from __future__ import annotations

import copy
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import command, compare, machine, plot, progress, report, run
from grpo_kernels import cli
from grpo_kernels.cli import bench as bench_command

ROOT = Path(__file__).parents[1]


def _row(kind: str, median: float, minimum: float | None = None, **more: Any) -> dict[str, Any]:
    return {"kind": kind, "median_us": median, "min_us": minimum or median, "speedup": 100.0 / median, **more}


def results() -> report.Results:
    rows = {
        "ours": _row("ours", 50.0, percent_of_copy=60.0),
        "ours, in place": _row("ours", 25.0, percent_of_copy=90.0),
        "eager": _row("eager", 100.0, percent_of_copy=30.0),
        "torch.compile": _row("compile", 80.0),
        "a peer": _row("peer", 200.0),
    }
    target = {"target": ">= 2x", "measured": 4.0, "met": True}
    moving = {"op": "op_a", "case": "2x3", "clock": "device", "bytes_moved": 10, "rows": rows, "targets": [target]}
    host_rows = {"ours": _row("ours", 9.0), "eager": _row("eager", 3.0)}
    host = {"op": "op_a", "case": "host cost", "clock": "host", "rows": host_rows, "targets": []}
    info = {"device": "d", "torch": "2", "python": "3", "threads": 1, "copy_gigabytes_per_second": 10.0}
    return {"machine": info, "seconds": 1, "skipped": [], "cases": [moving, host]}


def with_operations() -> report.Results:
    found = results()
    rows = {"ours": _row("ours", 10.0, teraflops=0.5), "eager": _row("eager", 100.0, teraflops=0.05)}
    record = {"op": "op_b", "case": "gemm", "clock": "device", "bytes_moved": 100, "operations": 10_000, "rows": rows}
    found["cases"].append({**record, "matmul_dtype": "bfloat16", "targets": []})
    found["machine"].update(matmul_teraflops={"bfloat16": 0.8, "float32": 0.1}, tf32=False)
    return found


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    report.save(results(), tmp_path / "old.json")
    return tmp_path / "old.json"


def test_saved_results_are_shown_instead_of_measuring(saved: Path, capsys) -> None:
    assert cli.main(["bench", "--results", str(saved)]) == 0
    shown = capsys.readouterr().out
    assert "1 of 1 targets met" in shown
    assert "ours, in place" in shown


def test_a_failed_kernel_gives_exit_status_1(tmp_path: Path, capsys) -> None:
    bad = results()
    bad["cases"][0]["rows"]["ours"] = {"kind": "ours", "error": "RuntimeError: no"}
    report.save(bad, tmp_path / "bad.json")
    assert cli.main(["bench", "--results", str(tmp_path / "bad.json")]) == 1
    assert "FAILED op_a, 2x3, ours: RuntimeError: no" in capsys.readouterr().out


def test_list_names_every_case_and_provider(capsys) -> None:
    assert cli.main(["bench", "--list", "--device", "cpu", "--op", "grpo_loss", "--op", "group_advantages"]) == 0
    shown = capsys.readouterr().out
    for case in run.choose("cpu", ["grpo_loss", "group_advantages"], quick=False):
        assert f"{case.op}: {case.name}" in shown
        assert "; ".join(provider.name for provider in case.providers) in shown
    assert "token_log_probs" not in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--op", "nothing"],
            "linear_cross_entropy, linear_grpo_loss, mtp_linear_cross_entropy, verify_draft, build_permutation, "
            "moe_unpermute, fp8_dequantize, got nothing",
        ),
        (["--fail-above", "1.2"], "--fail-above needs --compare"),
        (["--renew"], "--renew needs --save"),
        (["--save", "other.json", "--renew"], "--renew needs results of the same machine: device: d, now "),
        (["--compare", "missing.json"], "missing.json"),
        (["--results", "setup.py"], "setup.py is not JSON"),
        (["--results", "list.json"], "is not a file of results"),
    ],
)
def test_wrong_use_says_what_is_wrong(options: list[str], message: str, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "setup.py").write_text("import this")
    (tmp_path / "list.json").write_text("[]")
    report.save(results(), tmp_path / "other.json")
    monkeypatch.setattr(machine, "recycle_pages", lambda device, line: None)
    assert cli.main(["bench", *options]) == 2
    assert message in capsys.readouterr().err


def test_plots_without_matplotlib_are_refused_before_anything_runs(monkeypatch, saved: Path, capsys) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    assert cli.main(["bench", "--results", str(saved), "--plot", "x"]) == 2
    assert "--plot needs matplotlib" in capsys.readouterr().err


def test_an_installation_without_benchmarks_says_what_is_missing(monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr(bench_command.grpo_kernels, "__file__", str(tmp_path / "grpo_kernels" / "__init__.py"))
    assert cli.main(["bench", "--list"]) == 2
    assert "this installation has no benchmarks" in capsys.readouterr().err


def test_the_process_restarts_with_the_same_arguments_and_the_allocators_settings(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(machine.sys, "platform", "linux")
    calls = []

    def stop(program: str, line: list[str], environment: dict[str, str]) -> None:
        calls.append((program, line, environment))
        raise SystemExit

    monkeypatch.setattr(machine.os, "execve", stop)
    options = ["--op", "grpo_loss", "--op", "group_advantages", "--device", "cpu", "--quick", "--seconds", "0.5"]
    with pytest.raises(SystemExit):
        cli.main(["bench", *options, "--output", str(tmp_path)])
    ((program, line, environment),) = calls
    assert line == [sys.executable, "-m", "grpo_kernels.cli", "bench", *options, "--save", str(tmp_path)]
    assert program == sys.executable
    assert environment["GLIBC_TUNABLES"] == machine.RECYCLING


def test_results_go_to_a_file_or_into_a_folder_under_the_machines_name(tmp_path: Path) -> None:
    namespace = command.argparse.Namespace
    assert command._path(namespace(save=None), "cpu") is None
    assert command._path(namespace(save=tmp_path / "a.json"), "cpu") == tmp_path / "a.json"
    assert command._path(namespace(save=tmp_path), "cpu") == tmp_path / f"{machine.slug('cpu')}.json"
    assert command._path(namespace(save=tmp_path / "new"), "cpu") == tmp_path / "new" / f"{machine.slug('cpu')}.json"


def test_renewed_results_keep_what_was_not_measured_again() -> None:
    old, new = with_operations(), results()
    old["skipped"] = ["op_a: host cost", "op_c: large"]
    new["skipped"] = ["op_d: huge"]
    new["cases"] = [{**new["cases"][1], "case": "new"}, {**new["cases"][0], "rows": {"ours": _row("ours", 7.0)}}]
    new["machine"] |= {"copy_gigabytes_per_second": 9.0, "load_average": 0.5, "torch": "3"}
    new["machine"]["matmul_teraflops"] = {"float32": 0.2, "float16": 0.3}
    found = report.renewed(old, new)
    cases = [(record["op"], record["case"], record["rows"]["ours"]["median_us"]) for record in found["cases"]]
    assert cases == [("op_a", "2x3", 7.0), ("op_a", "host cost", 9.0), ("op_b", "gemm", 10.0), ("op_a", "new", 9.0)]
    assert found["skipped"] == ["op_c: large", "op_d: huge"]
    rates = {"bfloat16": 0.8, "float32": 0.2, "float16": 0.3}
    about = {"copy_gigabytes_per_second": 10.0, "load_average": 0.5, "torch": "3", "matmul_teraflops": rates}
    assert found["machine"] == old["machine"] | about


def test_a_file_keeps_the_cases_that_a_run_leaves_out(monkeypatch, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    old = results()
    old["machine"] |= machine.describe("cpu")
    report.save(old, path)
    new = copy.deepcopy(old)
    new["cases"] = [{**old["cases"][0], "rows": {"ours": _row("ours", 7.0)}}]
    monkeypatch.setattr(machine, "recycle_pages", lambda device, line: None)
    monkeypatch.setattr(run, "run", lambda *arguments: new)
    options = ["bench", "--op", "grpo_loss", "--device", "cpu", "--save", str(path)]
    assert cli.main([*options, "--renew"]) == 0
    assert report.load(path)["cases"] == [new["cases"][0], old["cases"][1]]
    assert cli.main(options) == 0
    assert report.load(path)["cases"] == new["cases"]


# --- comparisons ------------------------------------------------------------------------------------------------------


def changed(**rows: dict[str, Any]) -> report.Results:
    """The results, with other rows in the first case; None removes one."""
    new = copy.deepcopy(results())
    for name, row in rows.items():
        new["cases"][0]["rows"][name] = row
    return new


@pytest.mark.parametrize(
    ("row", "slower"),
    [
        (_row("ours", 59.0), 0),  # 1.18x
        (_row("ours", 65.0), 1),
        (_row("ours", 65.0, minimum=55.0), 0),  # the minimum moved by 1.1x only: other work on the machine
        ({"kind": "ours", "error": "RuntimeError: no"}, 1),
    ],
)
def test_ours_is_slower_if_median_and_minimum_grew_or_it_fails(row, slower, saved, tmp_path, capsys) -> None:
    report.save(changed(ours=row), tmp_path / "new.json")
    options = ["bench", "--results", str(tmp_path / "new.json"), "--compare", str(saved)]
    assert cli.main([*options, "--fail-above", "1.2"]) == slower
    shown = capsys.readouterr().out
    assert f"{slower} of 3 rows of ours are lost, or more than 1.2x slower" in shown
    assert cli.main(options) == (1 if "error" in row else 0)


def test_a_machine_that_is_slower_as_a_whole_is_no_regression(saved: Path, tmp_path: Path) -> None:
    new = changed(ours=_row("ours", 200.0), eager=_row("eager", 390.0))
    report.save(new, tmp_path / "new.json")
    options = ["bench", "--results", str(tmp_path / "new.json"), "--compare", str(saved), "--fail-above", "1.2"]
    assert cli.main(options) == 0
    report.save(changed(ours=_row("ours", 200.0), eager=_row("eager", 290.0)), tmp_path / "new.json")  # 4 / 2.9
    assert cli.main(options) == 1


def test_a_slower_baseline_is_no_regression(saved: Path, tmp_path: Path, capsys) -> None:
    report.save(changed(eager=_row("eager", 300.0)), tmp_path / "new.json")
    options = ["--results", str(tmp_path / "new.json"), "--compare", str(saved), "--fail-above", "1.2"]
    assert cli.main(["bench", *options]) == 0
    assert "3.00" in capsys.readouterr().out


def test_other_machines_are_shown_but_not_judged(saved: Path, tmp_path: Path, capsys) -> None:
    new = results()
    new["machine"]["device"] = "another"
    report.save(new, tmp_path / "new.json")
    options = ["bench", "--results", str(tmp_path / "new.json"), "--compare", str(saved)]
    assert cli.main(options) == 0
    assert "compared with another setting: device: d, now another" in capsys.readouterr().out
    assert cli.main([*options, "--fail-above", "1.2"]) == 2
    assert "needs results of the same machine: device: d, now another" in capsys.readouterr().err


def test_cases_that_only_one_file_has_are_not_compared(capsys) -> None:
    new = results()
    new["cases"][0]["case"] = "other"
    assert {change.case for change in compare.changes(results(), new)} == {"op_a: host cost"}
    assert compare.show(results(), {**new, "cases": []}, 1.2) == 0
    assert "the files share no case" in capsys.readouterr().out


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_pictures_are_written(tmp_path: Path, saved: Path) -> None:
    assert cli.main(["bench", "--results", str(saved), "--plot", str(tmp_path / "pictures")]) == 0
    for name in ("bench_speedup.png", "bench_roofline.png"):
        assert (tmp_path / "pictures" / name).read_bytes().startswith(b"\x89PNG")


def test_speedups_are_bars_from_one_and_leave_host_costs_out() -> None:
    (axes,) = plot.speedup_figure(results()).axes
    assert axes.get_title(loc="left") == "op_a"
    assert "times as fast as eager PyTorch" in axes.get_xlabel()
    assert [label.get_text() for label in axes.get_yticklabels()] == ["2x3"]
    assert [bar.get_x() + bar.get_width() for bar in axes.patches] == [4.0, 1.25, 0.5]
    assert [text.get_text() for text in axes.texts] == ["4.0x in place"]


def test_long_names_leave_room_for_the_bars() -> None:
    found = results()
    found["cases"][0]["case"] = " ".join(["layer T=1024"] * 10)
    figure = plot.speedup_figure(found)
    figure.canvas.draw()
    assert figure.axes[0].get_position().width > 0.5


def test_what_moves_bytes_is_put_against_the_copy() -> None:
    (axes,) = plot.roofline_figure(results()).axes
    assert axes.get_xlabel() == "percent of a large copy (10 GB/s, read plus written)"
    points = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"]
    assert points == [30.0, 90.0]


def test_a_roofline_draws_both_limits_and_the_points() -> None:
    _, axes = plot.roofline_figure(with_operations()).axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("operations per byte moved", "TFLOP/s")
    roofs = [line.get_ydata() for line in axes.lines if line.get_marker() != "o"]
    assert [(roof[1], roof[2]) for roof in roofs] == [(0.8, 0.8), (0.1, 0.1)]
    slopes = [line.get_ydata()[0] / line.get_xdata()[0] for line in axes.lines if line.get_marker() != "o"]
    assert slopes == pytest.approx([0.01, 0.01])  # TFLOP/s at one operation a byte: 10 GB/s
    points = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if line.get_marker() == "o"]
    assert points == [(100.0, 0.05), (100.0, 0.5)]


def test_nothing_to_draw_draws_nothing(tmp_path: Path) -> None:
    assert plot.draw({**results(), "cases": []}, tmp_path) == []


def test_the_record_in_the_repository_can_be_read_and_drawn() -> None:
    for path in (ROOT / "bench" / "results").glob("cpu-*.json"):
        assert plot.speedup_figure(report.load(path)) is not None


# --- the display ------------------------------------------------------------------------------------------------------


def test_lines_name_each_case_once(capsys) -> None:
    with progress.shown() as display:
        display.begin(2)
        display.case("a")
        display.step("timing ours")
        display.case("b")
    assert capsys.readouterr().err.splitlines() == ["[1/2] a", "[2/2] b"]


def test_the_bar_shows_case_and_provider(monkeypatch, capsys) -> None:
    pytest.importorskip("rich", reason="rich is not installed")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(progress, "_REFRESH", 0.0)
    bar = progress.Bar()
    bar.begin(2)
    bar.case("op: 2x3")
    bar.step("timing torch.compile")
    bar.close()
    shown = capsys.readouterr().err
    assert "0/2" in shown
    assert "op: 2x3: timing torch.compile" in shown


# --- the wheel --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with what a wheel without the extension holds."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("grpo_kernels", "bench"):
        shutil.copytree(ROOT / name, folder / "src" / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, folder / "src" / name)
    line = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(folder / "lib")]
    environment = {**os.environ, "GRPO_KERNELS_NATIVE": "0"}
    done = subprocess.run(line, cwd=folder / "src", env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "lib"


def _run_installed(installed: Path, *line: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, *line], cwd=installed.parent, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


needs_setup = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the source tree")


@needs_setup
def test_a_wheel_carries_the_benchmarks_but_not_their_tests_and_results(installed: Path) -> None:
    shipped = {path.name for path in (installed / "grpo_kernels" / "_bench").rglob("*")}
    assert {"command.py", "memory.py", "plot.py", "bench_grpo_loss.py", "__init__.py"} <= shipped
    assert not [name for name in shipped if name.startswith(("test_", "conftest", "pytest_", "gpu_check", "gates"))]
    assert not [name for name in shipped if not name.endswith(".py")]
    assert not (installed / "bench").exists()


@needs_setup
def test_an_installed_wheel_measures_memory_in_new_processes(installed: Path) -> None:
    code = (
        "from grpo_kernels._bench import memory; "
        "print(memory.peaks_in_new_process('group_advantages', 'eager', ['B=512 G=8'], 'smoke'))"
    )
    assert _run_installed(installed, "-c", code).startswith("({'B=512 G=8': ")


@needs_setup
def test_an_installed_wheel_lists_without_pytest_matplotlib_and_rich(installed: Path) -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('pytest', 'matplotlib', 'rich')))\n"
        "from grpo_kernels.cli import main; sys.exit(main(['bench', '--list', '--device', 'cpu']))"
    )
    assert "group_advantages: B=512 G=8" in _run_installed(installed, "-c", code)


@needs_setup
@pytest.mark.slow
def test_an_installed_wheel_measures(installed: Path, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    options = ["--op", "group_advantages", "--quick", "--seconds", "0.05", "--device", "cpu", "--save", str(path)]
    shown = _run_installed(installed, "-m", "grpo_kernels.cli", "bench", *options)
    assert "memory pages are recycled" in shown or sys.platform != "linux"
    assert report.load(path)["cases"][0]["rows"]["ours"]["median_us"] > 0
