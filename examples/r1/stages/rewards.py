"""Rewards of completions: rules, and the score of a reward model where no rule may be asked.

| column   | `digit_sorting`                                            | `spell_backward`           |
|----------|------------------------------------------------------------|----------------------------|
| accuracy | 1 if the answer is right                                   | not scored                 |
| format   | 1 if the completion has the task's form                    | the same                   |
| language | share of the thinking's characters in the task's script    | not scored: no thinking    |
| judge    | not scored                                                 | the reward model's score   |

What is not scored is NaN, which `group_advantages` leaves out of its statistics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from examples.r1.choices import GENERAL
from examples.r1.tasks import Problem, Task

NAMES = ("accuracy", "format", "language", "judge")
WEIGHTS = (1.0, 0.1, 0.2, 1.0)
ACCURACY, FORMAT, LANGUAGE, JUDGE = range(len(NAMES))
NOT_SCORED = float("nan")


class Ruling(NamedTuple):
    """What the rules say of one completion. A completion without the task's form is wrong, whatever it says."""

    right: bool
    format: float
    language: float  # NaN where there is no thinking to look at


def rule(task: Task, problem: Problem, completion: str, finished: bool) -> Ruling:
    """Judges one completion. One that ran out of room, or has padding in it, has no form and is not parsed."""
    match = task.form.fullmatch(completion) if finished else None
    language = 0.0
    if task.script is None:
        language = NOT_SCORED
    elif match is not None:
        thinking = match.group(1)
        language = sum(character in task.script for character in thinking) / max(len(thinking), 1)
    if match is None:
        return Ruling(False, 0.0, language)
    return Ruling(task.verify(match.groups()[-1], problem), 1.0, language)


def rule_all(
    tasks: Mapping[str, Task], problems: Sequence[Problem], completions: Sequence[str], finished: Sequence[bool]
) -> Tensor:
    """[B, 3] float32: right, format and language of every completion, whatever its task."""
    rows = [
        rule(tasks[problem.task], problem, completion, ended)
        for problem, completion, ended in zip(problems, completions, finished, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float32).view(-1, 3)


def of_task(problems: Sequence[Problem], task: str) -> Tensor:
    """[B] bool: which problems are of this task."""
    return torch.tensor([problem.task == task for problem in problems], dtype=torch.bool)


def training_rewards(rulings: Tensor, problems: Sequence[Problem], judged: Tensor | None = None) -> Tensor:
    """Rewards [B, 4] float32, in the order of `NAMES`, as training sees them.

    Args:
        rulings: [B, 3] float32, of `rule_all`.
        problems: B of them.
        judged: [B] float32. The reward model's scores, if it was asked.
    """
    table = torch.full((len(rulings), len(NAMES)), NOT_SCORED, dtype=torch.float32)
    table[:, : LANGUAGE + 1] = rulings.cpu()
    general = of_task(problems, GENERAL)
    table[general, ACCURACY] = NOT_SCORED
    if judged is not None:
        table[general, JUDGE] = judged.float().cpu()[general]
    return table


def totals(table: Tensor) -> Tensor:
    """The weighted sum of what scored each sample, [B] float32."""
    return torch.nansum(table * torch.tensor(WEIGHTS), dim=1)
