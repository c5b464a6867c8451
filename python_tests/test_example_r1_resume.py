"""Runs of the training example that are killed or interrupted go on to the same curves and models, to the bit."""

from __future__ import annotations

import json
import multiprocessing
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import fields, replace
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from random import Random
from typing import Any

import pytest
from rich.console import Console

from examples.r1 import __main__
from examples.r1.command_line import parse_arguments
from examples.r1.pipeline import Pipeline
from examples.r1.run import Run
from examples.r1.saving.model_folder import ModelFolder
from examples.r1.saving.storage import digest_of, load_tensors
from examples.r1.settings import Settings
from examples.r1.stages.grpo import DiverseRL, ReasoningRL
from examples.r1.stages.rejection import RejectionSampling
from examples.r1.stages.reward_model import RewardModelStage
from examples.r1.stages.sft import ColdStart

REPOSITORY = Path(__file__).parents[1]
TINY = Settings(
    threads=1,
    width=16,
    heads=2,
    sft_batch=8,
    cold_start_steps=5,
    reasoning_rl_steps=4,
    reward_model_steps=5,
    rejection_sampling_steps=5,
    diverse_rl_steps=4,
    prompts=4,
    group_size=4,
    rejection_prompts=8,
    rejection_group_size=2,
    judge_threshold=0.0,
    evaluate_every=2,
    evaluation_prompts=4,
    save_every=2,
)


def _train(settings: Settings) -> None:
    Pipeline(Run.prepare(settings), Console(quiet=True)).train()


def _found(output: Path) -> dict[str, Any]:
    """All that a run leaves, but times: curves, facts, samples, digests of tensors, models."""
    state = json.loads((output / "checkpoint" / "state.json").read_text())
    progress = state["progress"]
    del progress["seconds"]
    for records in progress["records"].values():
        for record in records:
            for name in [name for name in record if "seconds" in name]:
                del record[name]
    models = {path.stem: digest_of(load_tensors(path, "")[0]) for path in (output / "models").iterdir()}
    assert sorted(models) == sorted(Settings().stages)
    return {"progress": progress, "sha256": state["sha256"], "tensors": state["tensors"], "models": models}


@pytest.fixture(scope="module")
def start() -> Callable[..., BaseProcess]:
    """Starts processes that have imported everything and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "reasoning_gym", "torch._dynamo"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPOSITORY))  # the server does not take over sys.path
        forkserver.ensure_running()

    def started(function: Callable[..., None], *arguments: object) -> BaseProcess:
        process = context.Process(target=function, args=arguments)
        process.start()
        return process

    return started


def _exit_code(process: BaseProcess) -> int | None:
    process.join(timeout=200)
    return process.exitcode


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, start: Callable[..., BaseProcess]) -> dict[str, Any]:
    """What an uninterrupted run leaves."""
    output = tmp_path_factory.mktemp("whole")
    assert _exit_code(start(_train, replace(TINY, output=output))) == 0
    return _found(output)


# kill -9 ---------------------------------------------------------------------------------------------------------


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_in(owner: Any, name: str, call: int) -> None:
    """The process is killed as that call of a function begins."""
    function = getattr(owner, name)
    calls = 0

    def dying(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            _die()
        return function(*arguments, **options)

    setattr(owner, name, dying)


def _die_moving(prefix: str, after: bool) -> None:
    """The process is killed before or after a file of that name gets its place."""
    move = os.replace

    def dying(source: Path, target: Path) -> None:
        if target.name.startswith(prefix) and not after:
            _die()
        move(source, target)
        if target.name.startswith(prefix):
            _die()

    os.replace = dying  # type: ignore[assignment]


# Where the process is killed, and the checkpoint that it leaves.
_PLACES: list[tuple[Callable[[], None], str, int]] = [
    (lambda: _die_in(ColdStart, "step", 4), "cold_start", 2),
    (lambda: _die_in(ReasoningRL, "evaluate", 3), "reasoning_rl", 2),  # after step 4
    (lambda: _die_in(ModelFolder, "save", 1), "reasoning_rl", 2),
    (lambda: _die_in(RewardModelStage, "step", 4), "reward_model", 2),
    (lambda: _die_in(RejectionSampling, "_select", 2), "reward_model", 5),  # while it collects
    (lambda: _die_moving("rejection_sampling-000002", after=False), "rejection_sampling", 0),
    (lambda: _die_moving("rejection_sampling-000002", after=True), "rejection_sampling", 0),
    (lambda: _die_moving("rejection_sampling-000004", after=True), "rejection_sampling", 2),
    (lambda: _die_in(DiverseRL, "step", 4), "diverse_rl", 2),
    (lambda: _die_moving("diverse_rl-000004", after=True), "diverse_rl", 2),
]


def _train_and_die(settings: Settings, place: int) -> None:
    _PLACES[place][0]()
    _train(settings)


def _killed_at_all_places(settings: Settings, start: Callable[..., BaseProcess]) -> dict[str, Any]:
    for place, (_, *expected) in enumerate(_PLACES):
        process = start(_train_and_die, replace(settings, resume=place > 0), place)
        assert _exit_code(process) == -signal.SIGKILL, place
        progress = json.loads((settings.output / "checkpoint" / "state.json").read_text())["progress"]
        assert [progress["stage"], progress["steps_done"]] == expected, place
    assert _exit_code(start(_train, replace(settings, resume=True))) == 0
    return _found(settings.output)


def test_killed_in_steps_evaluations_collecting_and_saves(
    tmp_path: Path, start: Callable[..., BaseProcess], whole: dict[str, Any]
) -> None:
    assert _killed_at_all_places(replace(TINY, output=tmp_path), start) == whole


@pytest.mark.slow
def test_killed_with_experts_and_drafts(tmp_path: Path, start: Callable[..., BaseProcess]) -> None:
    settings = replace(TINY, model="moe", experts=4, mtp=1)
    assert _exit_code(start(_train, replace(settings, output=tmp_path / "whole"))) == 0
    found = _killed_at_all_places(replace(settings, output=tmp_path / "resumed"), start)
    assert found == _found(tmp_path / "whole")


def _train_for(settings: Settings, seconds: float) -> None:
    """The process is killed after so much time of the processor."""

    def watch() -> None:
        until = time.process_time() + seconds
        while time.process_time() < until:
            time.sleep(0.002)
        _die()

    threading.Thread(target=watch, daemon=True).start()
    _train(settings)


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path, start: Callable[..., BaseProcess], whole: dict[str, Any]) -> None:
    rng = Random(0)
    settings = replace(TINY, output=tmp_path, resume=True)
    for _ in range(4):
        assert _exit_code(start(_train_for, settings, rng.uniform(0.2, 1.0))) in (-signal.SIGKILL, 0)
    assert _exit_code(start(_train, settings)) == 0
    assert _found(tmp_path) == whole


# Ctrl-C ----------------------------------------------------------------------------------------------------------


def _options(settings: Settings) -> list[str]:
    """The command line of settings."""
    options = []
    for item in fields(Settings):
        value = getattr(settings, item.name)
        if value != item.default:
            options += [f"--{item.name.replace('_', '-')}", str(value)]
    return options


def _call(options: list[str], log: Path) -> None:
    """What `python -m examples.r1` does, its output into a file."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a shell ignores it
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(__main__.main(options))


def _wait_for(condition: Callable[[], bool], process: BaseProcess) -> None:
    while process.is_alive() and not condition():
        time.sleep(0.01)


def test_interrupted_in_reasoning_rl(tmp_path: Path, start: Callable[..., BaseProcess], whole: dict[str, Any]) -> None:
    output, log = tmp_path / "a folder", tmp_path / "log"
    process = start(_call, _options(replace(TINY, output=output, save_every=0)), log)
    _wait_for(lambda: "reasoning RL: rule rewards 1/4" in log.read_text() if log.exists() else False, process)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    assert _exit_code(process) == 130
    text = log.read_text()
    assert "stops after this step, with a checkpoint; once more to stop at once" in text
    assert f"stopped with a checkpoint in {output}/checkpoint; to go on from the last one:" in text
    progress = json.loads((output / "checkpoint" / "state.json").read_text())["progress"]
    assert progress["stage"] == "reasoning_rl"
    assert 1 <= progress["steps_done"] < 4
    words = shlex.split(text.splitlines()[-1])
    assert words[:3] == ["python", "-m", "examples.r1"]
    assert words[-1] == "--resume"
    short = ["--resume", "--output", str(output)]  # the other options are in the checkpoint
    assert (
        parse_arguments(short) == parse_arguments(words[3:]) == replace(TINY, output=output, save_every=0, resume=True)
    )
    assert _exit_code(start(_call, short, log)) == 0
    assert f"goes on after step {progress['steps_done']} of reasoning_rl" in log.read_text()
    assert _found(output) == whole
