"""How a policy does on held-out problems."""

from __future__ import annotations

from examples.r1.choices import GENERAL
from examples.r1.policy.model import CharTransformer
from examples.r1.policy.rollout import roll_out
from examples.r1.randomness import torch_rng
from examples.r1.results import Record
from examples.r1.run import Run
from examples.r1.stages.judge import RewardModel
from examples.r1.stages.rewards import of_task


def evaluate(model: CharTransformer, run: Run, judge: RewardModel | None = None) -> Record:
    """Of each task greedy accuracy, format and language, and the accuracy of samples at temperature 1.

    With a judge also the mean score that it gives to these samples of the task that it is there for.
    """
    greedy = roll_out(model, run, run.all_held_out)
    sampled = roll_out(model, run, run.all_held_out, generator=torch_rng(run.device, "evaluation"))
    record, means = greedy.means(), sampled.means()
    for task in run.tasks:
        record[f"{task}/sampled_accuracy"] = means[f"{task}/accuracy"]
    if judge is not None:
        scores = judge.score(sampled.sequences, sampled.group_size).cpu()
        record[f"{GENERAL}/judge"] = float(scores[of_task(sampled.problem_of_each, GENERAL)].mean())
    return record if sampled.drafts is None else record | sampled.drafts.record()
