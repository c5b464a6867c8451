"""How a policy does on held-out problems."""

from __future__ import annotations

from examples.r1.model import CharTransformer
from examples.r1.randomness import torch_rng
from examples.r1.results import Record
from examples.r1.rollout import roll_out
from examples.r1.run import Run


def evaluate(model: CharTransformer, run: Run) -> Record:
    """Of each task greedy accuracy, format and language, and the accuracy of samples at temperature 1."""
    problems = [problem for held_out in run.held_out.values() for problem in held_out]
    greedy = roll_out(model, run, problems)
    sampled = roll_out(model, run, problems, generator=torch_rng(run.device, "evaluation"))
    record = greedy.means()
    for task in run.tasks:
        record[f"{task}/sampled_accuracy"] = sampled.means()[f"{task}/accuracy"]
    return record if sampled.drafts is None else record | sampled.drafts.record()
