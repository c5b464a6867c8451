"""Tiny runs of the training example for comparisons of one process with several, in float64."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from safetensors.torch import load_file

from examples.r1.choices import REASONING
from examples.r1.interrupt import Interrupted
from examples.r1.parallel import Ranks
from examples.r1.pipeline import Pipeline
from examples.r1.run import Run
from examples.r1.settings import Settings
from examples.r1.stages import reward_model, rewards
from examples.r1.stages.rewards import Ruling
from examples.r1.tasks import Problem, Task

CPU = torch.device("cpu")
TINY = Settings(
    threads=1, width=16, layers=1, heads=2, experts=8, sft_batch=8, cold_start_steps=2, reasoning_rl_steps=2,
    reward_model_steps=2, rejection_sampling_steps=2, diverse_rl_steps=2, prompts=4, group_size=4, dynamic_sampling=2,
    diverse_dynamic_sampling=2,
    rejection_prompts=4, rejection_group_size=4, judge_threshold=0.0, evaluate_every=2, evaluation_prompts=4,
    save_every=1,
)  # fmt: skip


Trained = dict[str, Any]
"""What a run left, in plain values: records without times, evaluations, facts, samples, and its models' files."""


def ruling(task: Task, problem: Problem, completion: str, finished: bool) -> Ruling:
    """Rewards that differ from sample to sample although the policy has learnt nothing."""
    found = zlib.crc32((problem.prompt + completion).encode())
    language = found % 7 / 6 if problem.task == REASONING else float("nan")
    return Ruling(found % 3 == 0, float(found % 5 > 1), language)


@contextmanager
def prepared() -> Iterator[None]:
    """float64, rewards of `ruling`, and few examples for the reward model: for a process of its own."""
    before = (torch.get_default_dtype(), rewards.rule, reward_model.EXAMPLES)
    torch.set_default_dtype(torch.float64)
    rewards.rule, reward_model.EXAMPLES = ruling, 32
    try:
        yield
    finally:
        torch.set_default_dtype(before[0])
        rewards.rule, reward_model.EXAMPLES = before[1:]


def world_ranks() -> Ranks:
    """The ranks of the process group that is there."""
    return Ranks(dist.get_rank(), dist.get_world_size(), dist.group.WORLD, CPU)


def train(settings: Settings, ranks: Ranks, stop: Callable[[str, int], bool] | None = None) -> Trained | None:
    """Runs the stages; None if `stop`, asked after each step of a stage, told it to."""
    pipeline = _Stopping(Run.prepare(settings, ranks), Console(quiet=True))
    pipeline.stop = stop
    try:
        pipeline.train()
    except Interrupted:
        return None
    progress = pipeline.progress
    without = {
        name: [{key: value for key, value in record.items() if "seconds" not in key} for record in records]
        for name, records in progress.records.items()
    }
    ranks.barrier()  # the first rank writes
    models = {name: load_file(settings.output / "models" / f"{name}.safetensors") for name in settings.stages}
    return {
        "records": without,
        "evaluations": progress.evaluations,
        "facts": progress.facts,
        "samples": progress.samples,
        "models": models,
    }


class _Stopping(Pipeline):
    stop: Callable[[str, int], bool] | None = None

    def must_stop(self) -> bool:
        progress = self.progress
        return self.stop is not None and self.stop(progress.stage, progress.steps_done)


def stopped_and_resumed(settings: Settings, at: tuple[str, int], first: Ranks, then: Ranks) -> Trained | None:
    """A run that was stopped after a step and went on among other ranks; None on those that did not go on."""
    together = world_ranks()
    if first.world > 1 or together.is_main:
        assert train(settings, first, lambda *now: now == at) is None
    together.barrier()
    if then.world == 1 and not together.is_main:
        return None
    return train(replace(settings, resume=True, expert_parallel=settings.expert_parallel and then.world > 1), then)
