"""The training example in several processes is the example in one: every stage, every figure, every parameter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from examples.r1.__main__ import main
from examples.r1.parallel import Ranks
from examples.r1.run import Run
from examples.r1.settings import Settings
from python_tests.distributed import example_r1
from python_tests.distributed.example_r1 import TINY, Trained
from python_tests.distributed.launch import run

WORLD = 2
EXPERTS: dict[str, Any] = {"model": "moe", "mtp": 1, "preset": "dapo", "bias_update_rate": 0.3}  # biases that matter
SPREAD = EXPERTS | {"expert_parallel": True}
STOP = ("reasoning_rl", 1)  # the stage, and its steps
WAYS: dict[str, dict[str, Any]] = {
    "dense": {"shuffle_rewards": True, "aggregation": "sum_then_normalize"},
    "drafts": {"mtp": 2, "preset": "gspo", "updates_per_rollout": 4},
    "experts, with routes of training": {"model": "moe", "replay": "old"},
    "experts spread, with live routes": {"model": "moe", "replay": "off", "expert_parallel": True},
}
SAMPLED = ("reward", "tokens", "tokens_per_pass", "acceptance_1", "rounds", "informative")
WRONG: dict[str, dict[str, Any]] = {
    "group_size must be a multiple of 2, the number of ranks, got 3": {"group_size": 3},
    "rejection_group_size must be a multiple of 2, the number of ranks, got 5": {"rejection_group_size": 5},
    "sft_batch must be a multiple of 2, the number of ranks, got 7": {"sft_batch": 7},
    "evaluation_prompts must be a multiple of 2, the number of ranks, got 9": {"evaluation_prompts": 9},
    "experts must be a multiple of 2, the number of ranks, got 7": SPREAD | {"experts": 7},
    "preset 'kl_cov' chooses among the tokens of a whole batch": {"preset": "kl_cov"},
}


def _both(name: str, folder: Path, changes: dict[str, Any], ranks: Ranks, alone_on: int) -> dict[str, Any]:
    """What all ranks found together, and what one of them found by itself."""
    settings = replace(TINY, **changes)
    found: dict[str, Any] = {"together": example_r1.train(replace(settings, output=folder / name), ranks)}
    if ranks.rank == alone_on:
        single = replace(settings, output=folder / f"{name}, alone", expert_parallel=False)
        found["alone"] = example_r1.train(single, Ranks.single())
    return found


def _rank(rank: int, world: int, folder: str) -> dict[str, Any]:
    root, ranks, single = Path(folder), example_r1.world_ranks(), Ranks.single()
    with example_r1.prepared():
        found = _both("spread", root, SPREAD, ranks, 0)
        stage = replace(TINY, stages=STOP[:1], start_from=root / "spread")
        spread = replace(stage, output=root / "to one", **SPREAD)
        found["to one"] = example_r1.stopped_and_resumed(spread, STOP, ranks, single)
        alone = replace(stage, output=root / "to two", **EXPERTS)
        found["to two"] = example_r1.stopped_and_resumed(alone, STOP, single, ranks)
        found["errors"] = [_error(changes, ranks) for changes in WRONG.values()]
    return found


def _error(changes: dict[str, Any], ranks: Ranks) -> str:
    try:
        Run.prepare(replace(TINY, **changes), ranks)
    except ValueError as error:
        return str(error)
    return ""


def _rank_of_all_ways(rank: int, world: int, folder: str) -> dict[str, Any]:
    ranks = example_r1.world_ranks()
    with example_r1.prepared():
        return {
            name: _both(name, Path(folder), changes, ranks, index % world)
            for index, (name, changes) in enumerate(WAYS.items())
        }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(WORLD, _rank, str(tmp_path_factory.mktemp("ranks")))


def _assert_same(actual: Trained, expected: Trained) -> None:
    """Parameters are float64; what the loss measures is a sum of float32 numbers, rounded once."""
    for stage in actual["models"]:
        assert actual["models"][stage].keys() == expected["models"][stage].keys()
        for name, value in expected["models"][stage].items():
            torch.testing.assert_close(actual["models"][stage][name], value, rtol=0, atol=1e-12, msg=f"{stage} {name}")
        rounding = 4 * torch.finfo(torch.float32).eps
        for what in ("records", "evaluations"):
            pairs = zip(actual[what][stage], expected[what][stage], strict=True)
            for index, (found, wanted) in enumerate(pairs):
                assert found == pytest.approx(wanted, rel=rounding, abs=1e-12, nan_ok=True), (stage, what, index)
        assert actual["facts"][stage] == expected["facts"][stage]


def _assert_learnt(trained: Trained) -> None:
    """What is compared is not nothing."""
    for stage in ("reasoning_rl", "diverse_rl"):
        last = trained["records"][stage][-1]
        assert min(last["reward"], last["kl"], last["grad_norm"], last["informative"], last["ratio_max"] - 1) > 1e-9
    assert trained["facts"]["rejection_sampling"]["spell_backward/kept"] > 0
    assert all(len(models) > 0 for models in trained["models"].values())


def test_all_stages_with_spread_experts_and_drafts(results: list[dict[str, Any]]) -> None:
    alone = results[0]["alone"]
    _assert_learnt(alone)
    assert any(record["rounds"] > 1 for record in alone["records"]["reasoning_rl"] + alone["records"]["diverse_rl"])
    for result in results:
        _assert_same(result["together"], alone)
        assert result["together"]["samples"] == alone["samples"]
        assert result["together"]["records"] == results[0]["together"]["records"]  # to the bit


@pytest.mark.parametrize("way", ["to one", "to two"])
def test_a_checkpoint_does_not_depend_on_the_number_of_processes(results: list[dict[str, Any]], way: str) -> None:
    found = [result[way] for result in results if result[way] is not None]
    assert len(found) == (1 if way == "to one" else 2)
    for resumed in found:
        _assert_same(resumed, results[0]["alone"])


def test_what_processes_cannot_share_is_named(results: list[dict[str, Any]]) -> None:
    for result in results:
        for error, expected in zip(result["errors"], WRONG, strict=True):
            assert error.startswith(expected)


def test_experts_are_not_shared_out_in_one_process(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--model", "moe", "--expert-parallel", "--output", str(tmp_path)]) == 2
    assert "expert_parallel shares out experts among processes, and there is one" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--expert-parallel"])
    assert "expert_parallel shares out experts: model must be 'moe', got 'dense'" in capsys.readouterr().err


@pytest.mark.slow
def test_all_stages_in_other_ways(tmp_path: Path) -> None:
    results = run(WORLD, _rank_of_all_ways, str(tmp_path))
    for index, way in enumerate(WAYS):
        alone = results[index % WORLD][way]["alone"]
        _assert_learnt(alone)
        for result in results:
            _assert_same(result[way]["together"], alone)


def _start(output: Path, launcher: list[str], options: list[str]) -> dict[str, Any]:
    root = Path(__file__).parents[2]
    command = [sys.executable, *launcher, "-m", "examples.r1", "--output", str(output), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((output / "results.json").read_text())
    return found


def _options(settings: Settings) -> list[str]:
    names = (
        "threads", "width", "layers", "heads", "experts", "sft_batch", "cold_start_steps", "reasoning_rl_steps",
        "prompts", "group_size", "evaluation_prompts",
    )  # fmt: skip
    numbers = [word for name in names for word in (f"--{name.replace('_', '-')}", str(getattr(settings, name)))]
    return ["--stages", "cold_start", "reasoning_rl", "--model", "moe", "--mtp", "1", *numbers]


@pytest.mark.slow
def test_torchrun(tmp_path: Path) -> None:
    """In float32, as users run it. What earns nothing yet learns from rounding alone: of RL only samples count."""
    options = _options(TINY)
    alone = _start(tmp_path / "alone", [], options)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    together = _start(tmp_path / "together", torchrun, [*options, "--expert-parallel"])
    assert (alone["machine"]["processes"], together["machine"]["processes"]) == (1, 2)
    assert together["parameters"] == alone["parameters"]
    cold, reasoning = zip(together["stages"], alone["stages"], strict=True)
    for found, wanted in zip(*(stage["records"] for stage in cold), strict=True):
        kept = {name: value for name, value in wanted.items() if "seconds" not in name}
        assert {name: found[name] for name in kept} == pytest.approx(kept, rel=1e-4)
    files = [tmp_path / way / "models" / "cold_start.safetensors" for way in ("together", "alone")]
    torch.testing.assert_close(*map(load_file, files))
    sampled = [{name: stage["records"][0][name] for name in SAMPLED} for stage in reasoning]
    assert sampled[0] == pytest.approx(sampled[1], rel=1e-4)
