"""The tuner's processes, with a clock that is made up: candidates that hang, crash or give other bits cost no other."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.case import Provider
from bench.clock import Runner
from bench.tune import __main__ as command
from bench.tune import problems, worker
from bench.tune import trials as tune_trials
from bench.tune.candidates import Choice, candidates
from bench.tune.problems import GROUPS
from bench.tune.trials import Trials

GROUP = GROUPS[1]
TRIED = candidates(GROUP.op, 90, GROUP.size)

# What stands in for the device: seconds by the number of stages, and what becomes of some candidates.
FAKE = """
import json, sys, time
import torch
from bench.clock import Runner
from bench.tune import problems, worker
from bench.tune.candidates import Choice, candidates

FATES = {{Choice(*choice): fate for choice, fate in {fates!r}}}

def result(group, inputs, choice):
    fate = FATES.get(choice)
    if fate == "hangs" and not inputs["down"]:
        time.sleep(100)
    if fate == "raises":
        raise RuntimeError("no memory")
    return torch.full((3,), 2.0 if fate == "differs" else 1.0)

def runner(provider):
    stages = candidates("product", 90, "few")[0].num_stages if provider.name == "default" else eval(provider.name)[2]
    return Runner(provider, lambda: stages * 1e-6, "made up")

problems.result, worker._runners = result, lambda *_: runner
problems.make = lambda group, problem, device: {{"down": problem.down}}
sys.exit(worker.main())
"""


def trials(folder: Path, script: str, seconds: float = 100.0) -> Trials:
    (folder / "fake.py").write_text(script)
    command = (sys.executable, str(folder / "fake.py"))
    end = time.monotonic() + seconds
    return Trials("cpu", 90, folder, end, candidate_seconds=0.001, limit=5.0, worker=command)


@pytest.fixture(autouse=True)
def _import_from_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))


def test_each_fate_is_written_down_and_the_others_go_on(tmp_path: Path) -> None:
    fates = [(tuple(TRIED[1]), "hangs"), (tuple(TRIED[2]), "raises"), (tuple(TRIED[3]), "differs")]
    record = trials(tmp_path, FAKE.format(fates=fates)).group(GROUP)
    assert record["complete"]
    assert len(record["problems"]) == len(GROUP.problems)
    for which, problem in enumerate(record["problems"]):
        assert "error" not in problem
        lines = problem["candidates"]
        assert [line["choice"] for line in lines] == [list(choice) for choice in TRIED]
        assert lines[2]["error"] == "RuntimeError: no memory"
        assert (lines[3]["held"], lines[3]["difference"]) == (False, 1.0)
        assert lines[1].get("error") == ("it hung or crashed (status 1)" if which == 0 else None)
        for line in (lines[0], *lines[4:]):
            assert line["held"]
            assert line["microseconds"] == pytest.approx(line["choice"][2])
            assert line["default_microseconds"] == pytest.approx(TRIED[0].num_stages)
            assert line["clock"] == "made up"
    fewest = min(choice.num_stages for choice in (TRIED[0], *TRIED[4:]))
    assert record["winner"]["gain"] == pytest.approx(TRIED[0].num_stages / fewest, rel=1e-3)
    assert record["winner"]["choice"][2] == fewest


LINES = """
import json, sys
request = json.load(open(sys.argv[1]))
with open(request["output"], "a") as file:
{body}
sys.exit({status})
"""


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ("    pass", 1, "it hung or crashed (status 1)"),
        ("    print(json.dumps({'problem': request['jobs'][0][0], 'begun': True}), file=file)", 9, "(status 9)"),
        ("    print(json.dumps({'problem': 1, 'begun': True}), file=file)", 9, "(status 9)"),
        ("    pass", 0, "(status 0)"),
        ("    print(json.dumps({'problem': request['jobs'][0][0], 'error': 'too large'}), file=file)", 3, "too large"),
    ],
)
def test_a_default_that_fails(tmp_path: Path, body: str, status: int, says: str) -> None:
    """Its problems are given up, and the run ends."""
    record = trials(tmp_path, LINES.format(body=body, status=status)).group(GROUP)
    assert all(says in problem["error"] for problem in record["problems"])
    assert record["winner"] is None


def test_no_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured stays, a line that was cut off is nothing, and nothing is decided."""
    body = """
    print(json.dumps({'problem': 0, 'candidate': 0, 'held': True, 'microseconds': 1.0,
                      'default_microseconds': 1.0}), file=file)
    file.write('{"problem": 0, "candi')
    file.flush()
    __import__('time').sleep(100)
"""
    monkeypatch.setattr(tune_trials, "LEAST", 0.5)
    begin = time.monotonic()
    record = trials(tmp_path, LINES.format(body=body, status=0), seconds=1.5).group(GROUP)
    assert time.monotonic() - begin < 20
    assert not record["complete"]
    assert record["winner"] is None
    lines = record["problems"][0]["candidates"]
    assert lines[0]["microseconds"] == 1.0
    assert all(line == {"choice": list(choice)} for line, choice in zip(lines[1:], TRIED[1:], strict=True))
    results = {"groups": [record], "seconds": 7.0}
    assert command._verdict(results) == 75
    assert command._verdict({"groups": [record | {"complete": True}], "seconds": 7.0}) == 0


def test_times_are_medians_of_the_same_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"default": iter([9.0, *[2.0, 4.0, 3.0] * 20]), str(tuple(TRIED[1])): iter([1.0, 7.0, 2.0] * 20)}

    def make_runner(provider: Provider) -> Runner:
        return Runner(provider, lambda: next(seconds[provider.name]), "made up")

    monkeypatch.setattr(problems, "result", lambda group, inputs, choice: torch.ones(2))
    base = make_runner(Provider("default", lambda inputs: (), "ours"))
    base.samples.append(base.round())  # of another candidate's rounds
    found = worker.candidate(GROUP, {}, TRIED[1], torch.ones(2), make_runner, base, 0.0)
    assert found["rounds"] == worker.MINIMUM_ROUNDS
    assert (found["microseconds"], found["default_microseconds"]) == (2e6, 3e6)


def test_a_candidate_reaches_the_launcher() -> None:
    """And only within the block."""
    from grpo_kernels.grouped_gemm import _fp8_config_triton, _fp8_triton, _fp8_wgrad_triton

    choice = Choice(64, 8, 3, False, 2, 8)
    with problems.using(GROUPS[0], choice, 4096):
        assert _fp8_triton.launch_config(1, 1, 4096, 90) == (64, 8, 3, False, 2, 32)
    assert _fp8_triton.launch_config is _fp8_config_triton.launch_config
    with problems.using(GROUPS[2], choice, 4096):
        assert _fp8_wgrad_triton.wgrad_config(90, False)[:5] == choice[:5]
    assert _fp8_wgrad_triton.wgrad_config is _fp8_config_triton.wgrad_config


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.text)
def test_every_problem_runs(group: problems.Group, native_cpu: None) -> None:
    """Tiny and on the CPU. An accumulator gets one gradient, however often it ran before."""
    del native_cpu
    for problem in group.problems:
        tiny = problem.on("cpu")
        inputs = problems.make(group, tiny, "cpu")
        experts, rows, width, columns = tiny.shape
        found = problems.result(group, inputs, TRIED[0])
        again: Callable[[], Tensor] = lambda inputs=inputs: problems.result(group, inputs, TRIED[0])  # noqa: E731
        assert torch.equal(found, again())
        assert found.isfinite().all()
        assert found.any()
        wanted = {"few": (rows, columns), "many": (rows, columns), "aligned": (experts, columns, width)}
        assert tuple(found.shape) == wanted.get(group.size, (experts, columns, width + 1))


def test_without_a_gpu_nothing_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert command.main(["--op", "grouped_gemm"]) == 77
    assert "sees no device" in capsys.readouterr().out


def test_apply_says_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--apply", str(tmp_path / "none.json")]) == 1
    assert "none.json" in capsys.readouterr().err
