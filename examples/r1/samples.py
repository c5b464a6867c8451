"""What a policy answers to the same few held-out prompts after each stage, for a reader."""

from __future__ import annotations

from typing import Any

from examples.r1.parallel import SINGLE
from examples.r1.policy.rollout import roll_out
from examples.r1.stages.stage import Stage

SHOWN = 4  # prompts of each task


def answers(stage: Stage) -> list[dict[str, Any]]:
    """Greedy completions; none of a stage that trains no policy."""
    if not stage.trains_policy:
        return []
    problems = [problem for held_out in stage.run.held_out.values() for problem in held_out[:SHOWN]]
    rollout = roll_out(stage.model, stage.run, problems, ranks=SINGLE)  # too few to share: every rank samples all
    return [
        {
            "stage": stage.name,
            "task": problem.task,
            "prompt": problem.prompt,
            "completion": text,
            "correct": bool(ruling[0]),
        }
        for problem, text, ruling in zip(problems, rollout.texts, rollout.rulings, strict=True)
    ]
