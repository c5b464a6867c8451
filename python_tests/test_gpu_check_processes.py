"""What gpu-check runs its tests and programs with: worker processes, time limits, one process an op."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from bench.gpu_check import phases, processes, worker
from bench.gpu_check.settings import ROOT

PLANTED = """
    import ctypes, os, sys, time, types
    import pytest

    def test_first(): pass
    def test_fails(): assert 1 == 2
    def test_hangs(): time.sleep(60)
    def test_after_the_hang(): pass
    def test_segfault(): ctypes.string_at(0)
    def test_after_the_segfault(): pass
    @pytest.mark.parametrize("value", [1, 2])
    def test_sticky(value):
        def synchronize(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
        sys.modules["torch"] = types.SimpleNamespace(cuda=types.SimpleNamespace(
            is_initialized=lambda: True, synchronize=synchronize))
    def test_after_the_sticky_error(): assert "torch" not in sys.modules
    def test_exits(): os._exit(0)
    def test_skipped(): pytest.skip("needs luck")
    @pytest.fixture
    def broken(): raise ValueError("no fixture")
    def test_setup(broken): pass
    def test_last(): pass
"""


def _run_suite(folder: Path, *options: str, environment: dict[str, str] | None = None) -> tuple[int, str]:
    command = [sys.executable, "-m", "bench.gpu_check.suite", *options, "--", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout


def _outcomes(path: Path) -> dict[str, tuple[str, str]]:
    """By name of the test, or of a file that could not be read: its folders depend on where this checkout lies."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    names = [line["id"].rpartition("::")[2].rpartition("/")[2] for line in lines]
    return {name: (line["outcome"], line["message"]) for name, line in zip(names, lines, strict=True)}


def test_a_test_that_hangs_crashes_or_breaks_the_device_costs_no_other(tmp_path) -> None:
    (tmp_path / "test_planted.py").write_text(textwrap.dedent(PLANTED))
    (tmp_path / "test_broken.py").write_text("import a_module_that_is_not_there\n")
    file = tmp_path / "outcomes.jsonl"
    status, output = _run_suite(tmp_path, "--workers", "2", "--test-seconds", "1", "--results", str(file))
    outcomes = _outcomes(file)
    passed = {"test_first", "test_last", *(f"test_after_the_{what}" for what in ("hang", "segfault", "sticky_error"))}
    assert {name for name, (outcome, _) in outcomes.items() if outcome == "passed"} == passed
    assert outcomes["test_skipped"] == ("skipped", "Skipped: needs luck")
    assert {name: message for name, (outcome, message) in outcomes.items() if outcome == "failed"} == {
        "test_broken.py": "ModuleNotFoundError: No module named 'a_module_that_is_not_there'",
        "test_fails": "assert 1 == 2",
        "test_hangs": "it ran longer than 1 s",
        "test_segfault": "its process died: SIGSEGV",
        "test_sticky[1]": "the device was left in error: RuntimeError: CUDA error: an illegal memory access was "
        "encountered",
        "test_sticky[2]": "the device was left in error: RuntimeError: CUDA error: an illegal memory access was "
        "encountered",
        "test_exits": "its process ended with status 0",
        "test_setup": "ValueError: no fixture",
    }
    assert status == 1
    assert re.search(r"^5 passed, 8 failed, 1 skipped in \d+ s; failed: ", output, re.MULTILINE)
    assert "in test_hangs" in output, "where it hung"


def test_a_suite_goes_on_where_it_was_stopped(tmp_path) -> None:
    tests = "import time\ndef test_one(): pass\ndef test_two(): time.sleep(1.5)\ndef test_three(): pass\n"
    (tmp_path / "test_slow.py").write_text(tests)
    file = tmp_path / "outcomes.jsonl"
    status, output = _run_suite(tmp_path, "--deadline", "2.5", "--results", str(file))
    while status == phases.NOT_RUN:  # how far it comes depends on the machine
        before = len(file.read_text().splitlines()) if file.exists() else 0
        status, output = _run_suite(tmp_path, "--deadline", str(5 + before), "--results", str(file))
    assert status == 0
    assert "3 passed" in output
    assert len(file.read_text().splitlines()) == 3, "nothing ran twice"
    file.write_text(file.read_text().replace('"passed"', '"failed"', 1))
    status, output = _run_suite(tmp_path, "--results", str(file))
    assert status == 0
    assert len(file.read_text().splitlines()) == 4, "what failed is repeated"
    status, output = _run_suite(tmp_path, "--deadline", "0", "--results", str(tmp_path / "none"))
    assert status == 1
    assert "no test was found" in output


def test_a_suite_that_skips_everything_has_not_passed(tmp_path) -> None:
    (tmp_path / "test_all.py").write_text("import pytest\ndef test_it(): pytest.skip('no such device')\n")
    status, output = _run_suite(tmp_path)
    assert status == phases.SKIPPED
    assert "1 skipped" in output.splitlines()[-1]


def test_the_plugin_stands_in_for_pytest_timeout(monkeypatch) -> None:
    """The project's settings name an option of it, which pytest would otherwise refuse."""
    declared = []
    parser = type("Parser", (), {"addini": lambda self, name, help: declared.append(name)})()
    monkeypatch.setattr(worker.importlib.util, "find_spec", lambda name: None)
    worker.pytest_addoption(parser)
    assert declared == ["timeout"]


# --- processes -------------------------------------------------------------------------------------------------------


def _python(code: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code)]


def _lives(process: Path) -> bool:
    try:
        return ") Z " not in (process / "stat").read_text()
    except OSError:
        return False


def test_a_command_is_ended_with_all_that_it_started(tmp_path) -> None:
    code = """
        import os, signal, subprocess, sys, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for options in ({"process_group": 0}, {"start_new_session": True}):
            print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], **options).pid, flush=True)
        time.sleep(60)
    """
    log = tmp_path / "log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "_GRACE", 0.3)
        result = processes.run(_python(code), 1.0, log, None, tmp_path)
    assert result.stopped == "stopped at its limit of 1 s"
    assert result.status == -signal.SIGKILL
    assert result.seconds < 6
    children = [Path("/proc") / pid for pid in log.read_text().split()]
    assert len(children) == 2
    end = time.monotonic() + 5
    while any(_lives(child) for child in children):  # SIGKILL takes its time
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_command_that_is_not_there_fails(tmp_path) -> None:
    result = processes.run(["/nonexistent/program"], 5.0, tmp_path / "log", None, tmp_path)
    assert result.status == 127
    assert "/nonexistent/program" in (tmp_path / "log").read_text()


def test_each_op_runs_by_itself(tmp_path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os, sys, time\nop, file = sys.argv[2], sys.argv[4]\nprint('begun', op, flush=True)\n"
        "if op == 'hang': time.sleep(60)\nif op == 'crash': os.abort()\n"
        "json.dump({'right': op}, open(file, 'w'))\nprint('done', op)\n"
    )
    merged = tmp_path / "merged.json"
    options = ["--ops", "a,hang,crash,b", "--workers", "4", "--seconds", "2", "--json", str(merged), "--", str(script)]
    # The script takes `--op NAME --json FILE`, in the order in which they are added.
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu_check.each_op", *options], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    last = done.stdout.splitlines()[-1]
    assert "--- the end of hang:\nbegun hang\n--- the end of crash:\nbegun crash\n2 of 4" in done.stdout
    assert re.fullmatch(r"2 of 4 ops right in \d+ s; failed: hang \(stopped .*\), crash \(status -6\)", last)
    assert json.loads(merged.read_text()) == {"a": {"right": "a"}, "hang": None, "crash": None, "b": {"right": "b"}}
