"""The command that runs everything on a GPU, with small commands in place of its phases."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from bench.gpu_check import __main__ as command
from bench.gpu_check import phases, processes, results, runner, summary
from bench.gpu_check import settings as settings_module
from bench.gpu_check.__main__ import check, plan_lines
from bench.gpu_check.phases import PHASES, Phase
from bench.gpu_check.results import Check, Results
from bench.gpu_check.runner import Runner
from bench.gpu_check.settings import ROOT, Settings


def _python(code: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code)]


# --- phases within a budget ------------------------------------------------------------------------------------------


@pytest.fixture
def settings(tmp_path, monkeypatch) -> Settings:
    folders = tmp_path / "work", tmp_path / "a folder" / "out"
    for folder in folders:
        folder.mkdir(parents=True)
    monkeypatch.setattr(processes, "_GRACE", 0.3)
    monkeypatch.setattr(runner, "_LEAST", 1.0)
    return Settings(rehearse=True, python=sys.executable, work=folders[0], output=folders[1], budget=570)


def _phase(name: str, code: str, limit: float = 20, **options: object) -> Phase:
    return Phase(name, limit, lambda settings, seconds: _python(code), **options)


def _machine(settings: Settings) -> str:
    content = {"slug": "a-machine", "machine": {"device": "a machine", "torch": "2", "python": "3"}}
    return (
        f"open({str(phases.machine_file(settings))!r}, 'w').write({json.dumps(content)!r}); print('device: a machine')"
    )


def _found(found: Results) -> dict[str, tuple[str, str]]:
    return {entry.phase: (entry.verdict, entry.note) for entry in found.checks.values()}


def _options(**given: object) -> object:
    return type("Options", (), {"fresh": False, "resume": None, "only": None, **given})()


def test_verdicts(settings) -> None:
    chosen = [
        _phase("versions", _machine(settings)),
        _phase("good", "print('noise'); print('42 things in order'); print('more noise')", note=r"in order"),
        _phase("bad", "print('what went wrong'); raise SystemExit(3)"),
        _phase("absent", "print('no such tool'); raise SystemExit(77)"),
        _phase("half", "print('1 passed, 2 not run in 3 s'); raise SystemExit(75)"),
        _phase("hangs", "import time; print('at it', flush=True); time.sleep(60)", limit=1.5),
        Phase("program", 20, lambda settings, seconds: ["/nonexistent/program"]),
        Phase("command", 20, lambda settings, seconds: [phases.read_machine(settings)["missing"]]),
        _phase("after", "print('still here')"),
    ]
    found, _ = check(settings, chosen, _options())
    assert _found(found) == {
        "versions": ("pass", "device: a machine"),
        "good": ("pass", "42 things in order"),
        "bad": ("fail", "status 3: what went wrong"),
        "absent": ("skip", "no such tool"),
        "half": ("late", "1 passed, 2 not run in 3 s"),
        "hangs": ("late", "stopped at its limit of 2 s; its last words: at it"),
        "program": (
            "fail",
            "status 127: /nonexistent/program: [Errno 2] No such file or directory: '/nonexistent/program'",
        ),
        "command": ("fail", "KeyError: 'missing'"),
        "after": ("pass", "still here"),
    }
    assert summary.status(found) == 1
    assert sorted(path.name for path in settings.output.iterdir()) == [
        "a-machine.json",
        "gpu_check.log",
        "gpu_check_state.json",
    ]
    log = found.log.read_text()
    assert "===== bad\nwhat went wrong" in log
    written = json.loads(found.file.read_text())
    assert written["machine"]["device"] == "a machine"
    assert written["checks"][2] == {"phase": "bad", "verdict": "fail", "seconds": written["checks"][2]["seconds"],
                                    "note": "status 3: what went wrong"}  # fmt: skip
    assert written["cases"] == []


def test_nothing_runs_when_there_is_no_device(settings) -> None:
    found, _ = check(
        settings, [_phase("versions", "print('device: none'); raise SystemExit(1)"), PHASES[2]], _options()
    )
    assert _found(found) == {
        "versions": ("fail", "status 1: device: none"),
        "build": ("skip", "the phase versions did not pass"),
    }
    assert summary.status(found) == 1


def test_later_phases_keep_their_share(settings) -> None:
    chosen = [
        _phase("early", "", limit=500),
        _phase("reserved", "", limit=200, reserve=130),
        _phase("one", "", limit=100, reserve=60, group="together"),
        _phase("two", "", limit=100, reserve=60, group="together"),
        _phase("last", "", limit=100, reserve=25),
    ]
    run = Runner(settings, Results(settings), chosen, time.monotonic())
    limits = [run.limit(phase) for phase in chosen]
    assert limits == pytest.approx([570 - 8 - 130 - 60 - 25, 200, 100, 100, 100], abs=1)
    run.begin -= 400
    limits = [run.limit(phase) for phase in chosen]
    assert limits == pytest.approx([162 - 215, 162 - 85, 100, 100, 100], abs=1)
    run.results.checks["reserved"] = Check("reserved", "pass", 1.0, "")
    assert run.limit(chosen[0]) == pytest.approx(162 - 85, abs=1)


def test_a_plan_says_what_is_sure(settings) -> None:
    chosen = [
        _phase("early", "", limit=500),
        _phase("nice", "", limit=100, worthwhile=50),
        _phase("reserved", "", limit=200, reserve=130),
        _phase("one", "", limit=100, reserve=60, group="together"),
        _phase("two", "", limit=100, reserve=60, group="together"),
        _phase("last", "", limit=100, reserve=25),
    ]
    plan = Runner(settings, Results(settings), chosen, time.monotonic()).plan()
    assert [phase.name for phase, _, _ in plan] == [phase.name for phase in chosen]
    assert [most for _, most, _ in plan] == [500, 100, 200, 100, 100, 100]
    assert [least for _, _, least in plan] == pytest.approx([347, 0, 130, 60, 60, 25], abs=1)
    roomy = dataclasses.replace(settings, budget=2 * settings_module.BUDGET)
    plan = Runner(roomy, Results(roomy), chosen[1:], time.monotonic()).plan()
    assert [least for _, _, least in plan] == [200, 400, 200, 200, 200]


def test_the_phases_in_their_order_and_what_each_is_sure_of(settings) -> None:
    """However slow the machine is, the products of FP8 are tried on random problems and timed."""
    runner = Runner(settings, Results(settings), PHASES, time.monotonic())
    plan = {phase.name: least for phase, _, least in runner.plan()}
    names = list(plan)
    assert names[:5] == ["versions", "packages", "build", "small", "fuzz"]
    assert names.index("fuzz") < names.index("tests") < names.index("tuning") < names.index("benchmarks")
    assert plan["small"] > 15
    assert plan["fuzz"] == pytest.approx(45, abs=1)
    assert plan["benchmarks"] == pytest.approx(130, abs=1)
    one_each = {phase.group or phase.name: plan[phase.name] for phase in PHASES}
    assert sum(one_each.values()) < settings_module.BUDGET
    printed = " ".join(plan_lines(runner))
    assert "fuzz 75/45, verify 110/0," in printed
    assert max(map(len, plan_lines(runner))) < 120


def test_a_phase_that_may_be_left_out_is_skipped_and_says_why(settings) -> None:
    found = Results(settings)
    chosen = [
        _phase("tuning", "print('tuned 3 of 5 classes'); raise SystemExit(75)", worthwhile=9),
        _phase("little", "", limit=5, worthwhile=9),
    ]
    Runner(settings, found, chosen, time.monotonic()).run()
    assert _found(found) == {
        "tuning": ("skip", "tuned 3 of 5 classes"),
        "little": ("skip", "5 s were left for it, and it needs 9 s"),
    }
    assert summary.status(found) == 0
    found = Results(settings)
    late = [_phase("reserved", "", reserve=25), _phase("tuning", "print('tuned')", limit=12, worthwhile=12)]
    Runner(dataclasses.replace(settings, budget=35), found, late[::-1], time.monotonic()).run()
    assert _found(found)["tuning"] == ("pass", "tuned"), "in the time that the others left"


def test_a_group_runs_at_once_and_late_phases_are_not_begun(settings) -> None:
    meet = """
        import os, time
        open('{0}', 'w')
        end = time.time() + 8
        while not os.path.exists('{1}'):
            assert time.time() < end
    """
    one, two = (str(settings.work / name) for name in ("one", "two"))
    chosen = [
        _phase("one", meet.format(one, two), group="g"),
        _phase("two", meet.format(two, one), group="g"),
    ]
    found = Results(settings)
    Runner(settings, found, chosen, time.monotonic()).run()
    assert {name: verdict for name, (verdict, _) in _found(found).items()} == {"one": "pass", "two": "pass"}
    Runner(settings, found, [_phase("late", "")], time.monotonic() - 562).run()
    assert _found(found)["late"] == ("late", "no time left of 570 s")


def test_what_had_no_time_gets_what_is_left(settings) -> None:
    settings = dataclasses.replace(settings, budget=30)
    half = """
        import os, sys
        print('1 failed, 2 not run in 3 s')
        sys.exit(0 if os.path.exists('{0}') else open('{0}', 'w') and {1})
    """
    chosen = [
        _phase("starved", "print('in the end')"),
        _phase("reserved", "", reserve=25),
        _phase("suite", half.format(settings.work / "one", 75), outcomes=True),
        _phase("failing suite", half.format(settings.work / "two", 1), outcomes=True),
        _phase("hangs", "import time; time.sleep(60)", limit=1.5),
    ]
    found = Results(settings)
    Runner(settings, found, chosen, time.monotonic()).run()
    verdicts = {name: verdict for name, (verdict, _) in _found(found).items()}
    assert verdicts == {
        "starved": "pass",
        "reserved": "pass",
        "suite": "pass",
        "failing suite": "pass",
        "hangs": "late",
    }
    assert found.log_of("suite").read_text().count("not run") == 2, "the output of both"


# --- what is kept from run to run ------------------------------------------------------------------------------------


def _counting(settings: Settings, name: str, more: str = "", **options: object) -> Phase:
    file = str(settings.work / f"{name}.count")
    return _phase(name, f"open({file!r}, 'a').write('x')\n{more}", **options)


def _count(settings: Settings, name: str) -> int:
    return len((settings.work / f"{name}.count").read_text())


def test_a_second_run_does_what_the_first_left(settings) -> None:
    flaky = "import os, sys; sys.exit(0 if os.path.exists('{0}') else open('{0}', 'w') and 1)"
    chosen = [
        _phase("versions", _machine(settings), always=True),
        _counting(settings, "build", always=True),
        _counting(settings, "good"),
        _counting(settings, "flaky", flaky.format(settings.work / "second")),
    ]
    first, _ = check(settings, chosen, _options())
    assert first.checks["flaky"].verdict == "fail"
    second, _ = check(settings, chosen, _options())
    assert {name: verdict for name, (verdict, _) in _found(second).items()} == dict.fromkeys(
        ("versions", "build", "good", "flaky"), "pass"
    )
    assert [_count(settings, name) for name in ("build", "good", "flaky")] == [2, 1, 2]
    assert second.checks["good"].kept
    assert summary.status(second) == 0
    check(settings, chosen, _options(only=["good"]))
    assert _count(settings, "good") == 2, "asked for by name"
    check(settings, chosen, _options(fresh=True))
    assert _count(settings, "good") == 3


def test_the_tuner_keeps_what_it_measured_unless_everything_is_asked_for(settings, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(command, "ROOT", tmp_path)  # where folders are made
    phases.machine_file(settings).write_text('{"slug": "a-machine"}')
    (tuning,) = (phase for phase in phases.PHASES if phase.name == "tuning")
    assert "--resume" in tuning.command(settings, 100)
    assert "--resume" not in tuning.command(dataclasses.replace(settings, fresh=True), 100)
    assert command._settings(command._parse(["--fresh"])).fresh
    assert not command._settings(command._parse([])).fresh


@pytest.mark.parametrize("content", ["", "{", "[]", '"text"', '{"key": "KEY"}', '{"key": "KEY", "checks": [{}]}'])
def test_a_damaged_state_is_not_believed(content: str, settings) -> None:
    chosen = [_phase("versions", _machine(settings), always=True), _counting(settings, "good")]
    first, _ = check(settings, chosen, _options())
    (settings.work / first.state.name).write_text(content.replace("KEY", first.key))
    second, _ = check(settings, chosen, _options())
    assert _count(settings, "good") == 2
    assert not second.checks["good"].kept


def test_results_of_other_sources_are_not_kept(settings, monkeypatch) -> None:
    chosen = [_phase("versions", _machine(settings), always=True), _counting(settings, "good")]
    check(settings, chosen, _options())
    phases.bench_file(settings).write_text('{"machine": {}, "cases": [{"op": "of the other sources"}]}')
    monkeypatch.setattr(results, "source_digest", lambda: "other")
    found, _ = check(settings, chosen, _options())
    assert _count(settings, "good") == 2
    assert found.report()["cases"] == []


def test_outcomes_of_tests_travel_with_the_state(settings, tmp_path) -> None:
    suite = _phase("contract", "raise SystemExit(1)", outcomes=True)
    line = json.dumps({"id": "a::b", "outcome": "failed", "seconds": 1.0, "message": "m"})
    found = Results(settings)
    phases.outcomes_file(settings, "contract").write_text(line + '\n{"id": "half')
    found.key = "key"
    found.add(suite, Check("contract", "fail", 1.0, "1 failed; failed: a::b"))
    assert found.checks["contract"].failed == ["a::b"]
    phases.outcomes_file(settings, "contract").unlink()
    other = Results(settings)
    other.key = "key"
    assert other.resume(other.earlier(settings.output)).startswith("continuing")
    assert line in phases.outcomes_file(settings, "contract").read_text()


def test_verifications_of_the_ops_become_one() -> None:
    part = {"verified": True, "seconds": 1.0, "versions": {"torch": "2"}, "devices": {"cuda:0": "a"}, "failures": []}
    by_op = {"a": None, "b": {**part, "rows": [{"op": "b", "comparisons": 7}]}, "c": {**part, "rows": []}}
    merged = results.merged_verification(by_op)
    assert not merged["verified"]
    assert merged["summary"] == "FAILED: 1 checks; 3 ops, 7 comparisons"
    assert merged["failures"] == [{"op": "a", "verdict": "FAILED", "problem": "it did not finish"}]
    del by_op["a"]
    merged = results.merged_verification(by_op)
    assert merged == {**part, "seconds": 2.0, "rows": [{"op": "b", "comparisons": 7}],
                      "summary": "verified: 2 ops, 7 comparisons"}  # fmt: skip
    assert results.merged_verification(None) is None


def test_the_log_is_bounded(settings) -> None:
    text = results.shortened(b"a" * 10**6 + b"the end")
    assert len(text) < 400_000
    assert text.endswith("the end")
    assert "left out" in text


def test_a_run_that_is_told_to_stop_still_writes_and_prints(tmp_path) -> None:
    code = f"""
        import sys
        from bench.gpu_check import __main__ as command, phases
        hang = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"]
        command.PHASES = (
            phases.Phase("versions", 60, lambda s, l: [sys.executable, "-c", "print('device: none')"]),
            phases.Phase("hangs", 60, lambda s, l: hang),
            phases.Phase("never", 60, lambda s, l: hang),
        )
        sys.exit(command.main(["--fresh", "--output", {str(tmp_path / "out")!r}]))
    """
    environment = {**os.environ, "REHEARSE": "1", "GK_PYTHON": sys.executable}
    process = subprocess.Popen(_python(code), cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "hangs" in line:
            time.sleep(1)
            process.send_signal(signal.SIGTERM)
            break
    output = process.communicate(timeout=20)[0]
    assert process.returncode == 130
    assert "LATE  hangs" in output
    assert "stopped with the whole run; its last words: begun" in output
    assert "never" not in output


# --- the summary and the real table of phases ------------------------------------------------------------------------


def test_the_summary_is_one_screen(settings) -> None:
    found = Results(settings)
    found.bench = {
        "machine": {},
        "cases": [
            {
                "op": f"op{index % 7}",
                "rows": {
                    "ours": {"kind": "ours", "median_us": 10.0, "percent_of_copy": 80.0 + index, "speedup": 3.0},
                    "eager": {"kind": "eager", "median_us": 30.0, "speedup": 1.0},
                },
                "targets": [{"met": index % 2 == 0}, {"met": None}],
            }
            for index in range(14)
        ],
    }
    for phase in PHASES:
        found.checks[phase.name] = Check(phase.name, "pass", 12.0, "n" * 300)
    found.checks["tests"] = Check("tests", "fail", 9.0, "3 passed, 60 failed; failed: a", [f"t{i}" for i in range(60)])
    lines = summary.lines_of(found, 500.0)
    text = "\n".join(lines)
    assert len(lines) <= summary.LINES
    assert "7 targets met, 7 short; 14 cases" in text
    assert "op0: 80 to 87 % of copy bandwidth, median 3.0x eager, 2 cases" in text
    assert "FAILED t0" in text
    assert "more failed tests: see the log" in text
    assert str(settings.output) in lines[-1]
    assert summary.status(found) == 1
