"""Rule-based rewards: is the answer right, is the form right, is the thinking in one language."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from examples.r1.tasks import Problem, Task

NAMES = ("accuracy", "format", "language")
WEIGHTS = (1.0, 0.1, 0.2)

_FORMAT = re.compile(r"<t>([^<]*)</t><a>([^<]*)</a>")


def score(task: Task, problem: Problem, completion: str, finished: bool) -> tuple[float, float, float]:
    """Accuracy, format and language reward of one completion, each in [0, 1].

    An answer outside the form earns nothing, nor does a completion that ran out of room: what cannot be parsed is not
    checked. Language is the share of the thinking's characters in the task's script.
    """
    match = _FORMAT.fullmatch(completion) if finished else None
    if match is None:
        return 0.0, 0.0, 0.0
    thinking, answer = match.groups()
    native = sum(character in task.script for character in thinking)
    return task.verify(answer, problem), 1.0, native / max(len(thinking), 1)


def score_all(task: Task, problems: Sequence[Problem], completions: Sequence[str], finished: Sequence[bool]) -> Tensor:
    """Rewards [B, 3] float32, in the order of `NAMES`."""
    rows = [score(task, *row) for row in zip(problems, completions, finished, strict=True)]
    return torch.tensor(rows, dtype=torch.float32)
