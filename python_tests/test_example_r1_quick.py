"""The shorter run: its options, and that every kind of model learns in it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from examples.r1.command_line import parse_arguments
from examples.r1.pipeline import Pipeline
from examples.r1.quick import QUICK
from examples.r1.run import Run
from examples.r1.settings import STAGES, Settings
from python_tests.r1_stages import DIGITS, WORDS, one_thread  # noqa: F401


def test_the_quick_run_is_the_same_with_less() -> None:
    default, quick = Settings(), parse_arguments(["--quick"])
    for name, value in QUICK.items():
        assert getattr(quick, name) == value < getattr(default, name), name
    assert all(f"{stage}_steps" in QUICK for stage in default.stages)
    assert quick.stages == default.stages


def test_other_options_count_beside_it() -> None:
    settings = parse_arguments(["--prompts", "24", "--quick", "--model", "moe"])
    assert (settings.prompts, settings.model) == (24, "moe")
    assert settings.reasoning_rl_steps == QUICK["reasoning_rl_steps"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_experts_in_fp8_with_drafts_learn_in_all_stages(tmp_path: Path) -> None:
    """The stages of the quick run with everything at once that a model can have."""
    options = ["--quick", "--model", "moe", "--recipe", "fp8_block128", "--mtp", "1", "--output", str(tmp_path)]
    settings = replace(parse_arguments(options), threads=1, save_every=0, evaluate_every=1000)
    pipeline = Pipeline(Run.prepare(settings), Console(quiet=True))
    model = pipeline.train().model
    found = {stage.name: stage for stage in pipeline.results}
    assert tuple(found) == STAGES
    reasoning, final = found["reasoning_rl"], found["diverse_rl"].after
    assert reasoning.after[f"{DIGITS}/sampled_accuracy"] >= reasoning.before[f"{DIGITS}/sampled_accuracy"] + 0.1
    assert final[f"{DIGITS}/accuracy"] >= 0.75
    assert final[f"{WORDS}/accuracy"] >= 0.75
    assert found["reward_model"].after["judge/agreement"] >= 0.95
    facts = found["rejection_sampling"].facts
    assert facts[f"{DIGITS}/kept_right"] == 1.0
    assert facts[f"{WORDS}/kept_right"] >= 0.7
    records = [record for stage in found.values() for record in stage.records]
    assert all(math.isfinite(value) for record in records for value in record.values())
    assert final["acceptance_1"] >= 0.6
    assert max(record["expert_load"] for record in reasoning.records) < 4.0  # E / K: all tokens at the same two
    assert all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())
