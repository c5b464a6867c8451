"""Small runs of examples.r1 for its tests: narrow layers, few prompts, and samples that a test writes itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from examples.r1.policy.model import CharTransformer
from examples.r1.policy.rollout import Rollout
from examples.r1.run import Run
from examples.r1.settings import Settings
from examples.r1.stages import rewards
from examples.r1.stages.sft import ColdStart, write_down
from examples.r1.tasks import Problem

CPU = torch.device("cpu")
DIGITS, WORDS = "digit_sorting", "spell_backward"
TINY = Settings(
    output=Path("unused"), threads=1, width=16, heads=2, experts=4, sft_batch=8, cold_start_steps=4,
    reasoning_rl_steps=4, reward_model_steps=4, rejection_sampling_steps=4, diverse_rl_steps=4, prompts=4, group_size=4,
    dynamic_sampling=1, rejection_prompts=8, rejection_group_size=4, evaluate_every=2, evaluation_prompts=8,
    save_every=2,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """These models are too small to share out; other tests get their threads back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def _prepared() -> Run:
    return Run.prepare(TINY)


def tiny_run(**changes: Any) -> Run:
    """A run of `TINY` with changes; the tasks and their held-out problems are made once."""
    return replace(_prepared(), settings=replace(TINY, **changes))


def beginner(run: Run, tasks: Sequence[str] = (DIGITS, WORDS)) -> CharTransformer:
    """The run's policy after the cold start, on the demonstrations of these tasks."""
    stage = ColdStart(run.build_policy(), run)
    counts = [task.cold_examples for task in run.tasks.values()]
    ends = dict(zip(run.tasks, torch.tensor(counts).cumsum(0).tolist(), strict=True))
    rows = [torch.arange(ends[name] - run.tasks[name].cold_examples, ends[name]) for name in tasks]
    stage.data = stage.data.select(torch.cat(rows))
    for index in range(stage.steps):
        stage.step(index)
    return stage.model


def gradients(loss: Tensor, model: CharTransformer) -> dict[str, Tensor]:
    """By name of the parameter."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def written(run: Run, problems: Sequence[Problem], texts: Sequence[str]) -> Rollout:
    """What a policy would leave that wrote these texts, as many for each problem as for any other."""
    of_each = [problem for problem in problems for _ in range(len(texts) // len(problems))]
    sequences = write_down(run, of_each, texts)._replace(prompts=run.encode_prompts(problems))
    rulings = rewards.rule_all(run.tasks, of_each, texts, [True] * len(texts))
    return Rollout(list(problems), sequences, list(texts), rulings)
