"""What drafts are worth in time: the same policy samples the same prompts with them and without."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from examples.r1.parallel import Ranks
from examples.r1.policy import draft, rollout
from examples.r1.policy.sequences import make_sequences
from examples.r1.randomness import torch_rng
from examples.r1.stages.grpo import RLStage


class DraftSpeed(NamedTuple):
    """Tokens a second of sampling, of all ranks, medians."""

    tokens_per_second: float
    tokens_per_second_without: float


def compare(stage: RLStage, index: int, repeats: int = 5) -> DraftSpeed:
    """Samples the prompts of a step with drafts and without; the two take turns. Every rank takes part."""
    run = stage.run
    prompts = run.encode_prompts(stage.problems(index, 0))
    inputs = (stage.model, prompts, run.completion_length)
    options: dict[str, Any] = {
        "group_size": run.settings.group_size,
        "temperature": stage.temperature,
        "ranks": run.ranks,
    }
    rates: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats):
        for generate, found in zip((_with_drafts, rollout.generate), rates, strict=True):
            generator = torch_rng(stage.device, run.settings.seed, stage.name, "draft speed", index, repeat)
            found.append(_rate(prompts, run.ranks, partial(generate, *inputs, generator=generator, **options)))
    return DraftSpeed(*map(median, rates))


def _with_drafts(*arguments: Any, **options: Any) -> Tensor:
    return draft.generate(*arguments, **options).completions


def _rate(prompts: Tensor, ranks: Ranks, sample: Callable[[], Tensor]) -> float:
    """Tokens a second, up to and with END."""
    if prompts.is_cuda:
        torch.cuda.synchronize()
    start = perf_counter()
    completions = sample()
    if prompts.is_cuda:
        torch.cuda.synchronize()
    seconds = perf_counter() - start
    return ranks.total(make_sequences(prompts, completions.clone()).mask.sum()) / seconds
