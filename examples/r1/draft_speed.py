"""What drafts are worth in time: the same policy samples the same prompts with them and without."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import islice
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from examples.r1 import draft, rollout
from examples.r1.grpo import GRPOStage
from examples.r1.rollout import encode_prompts, make_sequences, python_rng, torch_rng


class DraftSpeed(NamedTuple):
    """Tokens a second of sampling, medians."""

    tokens_per_second: float
    tokens_per_second_without: float


def compare(stage: GRPOStage, index: int, repeats: int = 5) -> DraftSpeed:
    """Samples the prompts of a step with drafts and without; the two take turns."""
    source = (stage.settings.seed, stage.task.name, "draft speed", index)
    problems = islice(stage.task.training(python_rng(*source), stage.excluded_prompts), stage.settings.prompts)
    prompts = encode_prompts(stage.task, list(problems), stage.device)
    inputs = (stage.model, prompts, stage.task.completion_length)
    options = {"group_size": stage.settings.group_size, "temperature": stage.settings.temperature}
    rates: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats):
        for generate, found in zip((_with_drafts, rollout.generate), rates, strict=True):
            generator = torch_rng(stage.device, *source, repeat)
            found.append(_rate(prompts, partial(generate, *inputs, generator=generator, **options)))
    return DraftSpeed(*map(median, rates))


def _with_drafts(*arguments: Any, **options: Any) -> Tensor:
    return draft.generate(*arguments, **options).completions


def _rate(prompts: Tensor, sample: Callable[[], Tensor]) -> float:
    """Tokens a second, up to and with END."""
    if prompts.is_cuda:
        torch.cuda.synchronize()
    start = perf_counter()
    completions = sample()
    if prompts.is_cuda:
        torch.cuda.synchronize()
    seconds = perf_counter() - start
    return int(make_sequences(prompts, completions.clone()).mask.sum()) / seconds
