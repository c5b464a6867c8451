"""The stage that trains the reward model, and answers that it must find worse than right ones."""

from __future__ import annotations

from collections.abc import Sequence

from examples.r1.choices import GENERAL
from examples.r1.policy.model import CharTransformer
from examples.r1.randomness import python_rng
from examples.r1.results import Record
from examples.r1.run import Run
from examples.r1.saving.model_folder import ModelFolder
from examples.r1.stages.judge import RewardModel
from examples.r1.stages.sft import SFTStage, solutions, write_down
from examples.r1.tasks import Problem

WEAK_STEPS = 20  # of training, after which the control takes the judge
EXAMPLES = 4000  # good answers that it learns from


class RewardModelStage(SFTStage):
    """Teaches the reward model good answers to the task that no rule checks: its part of stage 3."""

    name = "reward_model"
    trains_policy = False

    @classmethod
    def start(cls, run: Run, models: ModelFolder) -> RewardModelStage:
        return cls(run.build_judge(), run)

    def __init__(self, model: CharTransformer, run: Run) -> None:
        super().__init__(model, run)
        self.data = solutions(run, run.draw(GENERAL, EXAMPLES, self.name))
        problems = run.held_out[GENERAL]
        self.validation_data = solutions(run, problems)
        self._wrong = write_down(run, problems, garbled(problems))

    @property
    def steps(self) -> int:
        return WEAK_STEPS if self.settings.weak_judge else self.settings.reward_model_steps

    def evaluate(self) -> Record:
        """Mean scores of right answers and of wrong ones, and how often the right one of a pair scores higher."""
        judge = RewardModel(self.model, self.run.ranks)
        part = self.run.ranks.part("evaluation_prompts", len(self._wrong.prompts))
        right, wrong = (judge.score(data.select(part)) for data in (self.validation_data, self._wrong))
        return {
            "validation_loss": self.validation_loss(),
            "judge/right": float(right.mean()),
            "judge/wrong": float(wrong.mean()),
            "judge/agreement": float((right > wrong).float().mean()),
        }


def garbled(problems: Sequence[Problem]) -> list[str]:
    """A wrong answer in the right form to each problem: two different letters have changed places."""
    rng = python_rng("garbled")
    texts = []
    for problem in problems:
        letters = list(problem.entry["answer"])
        first, second = 0, 0
        while letters[first] == letters[second]:
            first, second = rng.randrange(len(letters)), rng.randrange(len(letters))
        letters[first], letters[second] = letters[second], letters[first]
        texts.append(f"<a>{''.join(letters)}</a>")
    return texts
