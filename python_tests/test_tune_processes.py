"""The tuner's processes, with a clock that is made up: candidates that hang, crash or give other bits cost no other."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch

from bench.case import Provider
from bench.clock import Runner
from bench.gates import fingerprint
from bench.tune import __main__ as command
from bench.tune import choose, heads, problems, worker
from bench.tune import trials as tune_trials
from bench.tune.candidates import Choice, candidates, default
from bench.tune.heads import Head
from bench.tune.problems import GROUPS
from bench.tune.trials import Trials

GROUP = next(group for group in GROUPS if group.text == "product few")
TRIED = candidates(GROUP.op, 90, GROUP.size)

# What stands in for the device: seconds by the number of stages, and what becomes of some candidates.
FAKE = """
import json, sys, time
import torch
from bench.clock import Runner
from bench.tune import choose, heads, problems, worker
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

    base = make_runner(Provider("default", lambda inputs: (), "ours"))
    base.samples.append(base.round())  # of another candidate's rounds
    found = worker.candidate(GROUP, TRIED[1], lambda choice: {"held": True}, make_runner, base, 0.0)
    assert found["rounds"] == worker.MINIMUM_ROUNDS
    assert (found["microseconds"], found["default_microseconds"]) == (2e6, 3e6)


def test_a_candidate_reaches_the_launcher() -> None:
    """And only within the block."""
    from grpo_kernels.grouped_gemm import _fp8_config_triton, _fp8_triton, _fp8_wgrad_triton

    choice = Choice(64, 8, 3, False, 2, 8)
    inputs = {"x": torch.empty(1, 4096)}
    with problems.using(GROUP, choice, inputs):
        assert _fp8_triton.launch_config(1, 1, 4096, 90) == (64, 8, 3, False, 2, 32)
    assert _fp8_triton.launch_config is _fp8_config_triton.launch_config
    with problems.using(next(group for group in GROUPS if group.op == "wgrad"), choice, inputs):
        assert _fp8_wgrad_triton.wgrad_config(90, False)[:5] == choice[:5]
    assert _fp8_wgrad_triton.wgrad_config is _fp8_config_triton.wgrad_config


def _shape(group: problems.Group, problem: problems.Problem) -> tuple[int, ...]:
    """Of what is compared."""
    if isinstance(problem, Head):
        return (2, problem.rows) if group.op == "forward" else (1, problem.vocab)
    experts, rows, width, columns = problem.shape
    if group.op in ("product", "grouped"):
        return rows, columns
    return experts, columns, width + (group.size == "narrow")


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.text)
def test_every_problem_runs(group: problems.Group, native_cpu: None) -> None:
    """Tiny and on the CPU. An accumulator gets one gradient, however often it ran before; the default is accepted."""
    del native_cpu
    first = default(group.op, 90, group.size)
    for problem in group.problems:
        tiny = problem.on("cpu")
        inputs = problems.make(group, tiny, "cpu")
        found = problems.result(group, inputs, first)
        assert torch.equal(found, problems.result(group, inputs, first))
        assert found.isfinite().all()
        assert found.any()
        assert tuple(found.shape) == _shape(group, tiny)
        assert problems.run(group, inputs, first) is not None
        if group.op != "forward":  # the CPU's bits depend on the number of rows
            assert problems.judge(group, inputs, first)(first) == {"held": True}


def test_log_probs_are_judged_by_their_errors_and_without_other_rows() -> None:
    torch.manual_seed(0)
    inputs = heads.make("forward", "16-bit lora", Head("small", 50, 16, 40), "cpu", "native")
    judge = heads.Judge("16-bit lora", inputs)
    rows = torch.arange(40)
    exact = heads._definition("16-bit lora", inputs, rows, torch.float64).float()
    found = judge.verdict(exact, lambda fewer: exact[:, : len(fewer["hidden"])])
    assert found == {"held": True}
    for row in (0, 1):  # log-probs, entropy
        wrong = exact.clone()
        wrong[row] *= 1 + 1e-4
        found = judge.verdict(wrong, lambda fewer: exact)
        assert (found["held"], found["why"]) == (False, "less exact than the budget")
    found = judge.verdict(exact, lambda fewer: exact[:, : len(fewer["hidden"])].nextafter(torch.ones(())))
    assert (found["held"], found["why"]) == (False, "bits depend on the number of rows")
    whole = torch.nn.functional.linear(inputs["hidden"].double(), inputs["weight"].double())
    whole += heads.SCALE * (inputs["hidden"].double() @ inputs["lora_a"].double().t()) @ inputs["lora_b"].double().t()
    log_probs = torch.log_softmax(whole, 1).gather(1, inputs["token_ids"][:, None])[:, 0]
    torch.testing.assert_close(exact[0], log_probs.float())


def test_what_was_measured_to_the_end_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second run with --resume goes on; another code, or without it, begins anew."""
    asked: list[str] = []

    def measured(self: Trials, group: problems.Group) -> dict[str, object]:
        asked.append(group.text)
        lines = [
            {"choice": list(choice), "held": True, "microseconds": 1.0, "default_microseconds": 1.0}
            for choice in candidates(group.op, 90, group.size)
        ]
        record = {"op": group.op, "size": group.size, "complete": len(asked) != 2}
        record["problems"] = [{"problem": "made up", "candidates": lines}]
        return {**record, "winner": choose.winner(record)}

    monkeypatch.setattr(Trials, "group", measured)
    names = [group.text for group in GROUPS if group.package == "linear_log_probs"]
    arguments = ["--device", "cpu", "--op", "linear_log_probs", "--save", str(tmp_path / "tune.json")]
    assert command.main(arguments) == 75
    assert asked == names
    asked.append("again")
    assert command.main([*arguments, "--resume"]) == 0
    assert asked[len(names) + 1 :] == names[1:2]
    assert command.main([*arguments, "--resume"]) == 0
    assert asked[len(names) + 1 :] == names[1:2]
    monkeypatch.setattr(fingerprint, "of", lambda op, compiler: "other code")
    assert command.main([*arguments, "--resume"]) == 0
    assert len(asked) == 2 * len(names) + 2


def test_without_a_gpu_nothing_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert command.main(["--op", "grouped_gemm"]) == 77
    assert "sees no device" in capsys.readouterr().out


def test_apply_says_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--apply", str(tmp_path / "none.json")]) == 1
    assert "none.json" in capsys.readouterr().err
