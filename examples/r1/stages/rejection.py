"""Stage 3: samples of the reasoning policy are judged, and the base model starts anew on the good ones."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from examples.r1.choices import GENERAL, REASONING
from examples.r1.errors import RunError
from examples.r1.policy.model import CharTransformer
from examples.r1.policy.rollout import Rollout, roll_out
from examples.r1.policy.sequences import Sequences, concatenate, make_sequences
from examples.r1.randomness import torch_rng
from examples.r1.results import Record
from examples.r1.run import Run
from examples.r1.saving.model_folder import ModelFolder
from examples.r1.stages import rewards
from examples.r1.stages.judge import RewardModel
from examples.r1.stages.sft import SFTStage, solutions
from grpo_kernels import best_of_group

BATCH = 128  # prompts that are sampled at a time


class RejectionSampling(SFTStage):
    """Keeps the best sample of every prompt, if it is good enough, and fine-tunes the base model on these.

    Good enough is what the rules find right in every respect; where no rule may be asked, what the reward model scores
    above a threshold.
    """

    name = "rejection_sampling"

    @classmethod
    def start(cls, run: Run, models: ModelFolder) -> RejectionSampling:
        policy = models.load("reasoning_rl", run.build_policy())
        return cls(run.build_policy(), run, policy, RewardModel.trained(run, models))

    def __init__(self, model: CharTransformer, run: Run, policy: CharTransformer, judge: RewardModel) -> None:
        super().__init__(model, run)
        self.policy = policy
        self.judge = judge
        self._facts: Record = {}
        self.validation_data = solutions(run, run.all_held_out)

    def begin(self) -> None:
        """Samples, judges, and keeps."""
        self.data = concatenate([self._collect(task) for task in (REASONING, GENERAL)])
        if len(self.data.prompts) == 0:
            raise RunError(
                "rejection sampling: no sample was good enough: train the policy for longer, or lower judge_threshold"
            )

    def _collect(self, task: str) -> Sequences:
        """What is kept of a task; the facts say of how many prompts, and how much of it is really right."""
        problems = self.run.draw(task, self.settings.rejection_prompts, self.name)
        parts, right = [], 0.0
        for start in range(0, len(problems), BATCH):
            rollout = roll_out(
                self.policy,
                self.run,
                problems[start : start + BATCH],
                group_size=self.settings.rejection_group_size,
                generator=torch_rng(self.device, self.settings.seed, self.name, task, start),
            )
            selected = self._select(rollout, task)
            parts.append(self._chosen(rollout, selected))
            right += float(rollout.rulings[selected.cpu(), 0].sum())
        kept = concatenate(parts)
        count = len(kept.prompts)
        self._facts |= {
            f"{task}/prompts": float(len(problems)),
            f"{task}/kept": float(count),
            f"{task}/kept_right": right / max(count, 1),
        }
        return kept

    def _select(self, rollout: Rollout, task: str) -> Tensor:
        """[B] bool: the best sample of each group that has a good one."""
        if task == REASONING:
            scores = rewards.totals(rewards.training_rewards(rollout.rulings, rollout.problem_of_each))
            valid = (rollout.rulings >= 1.0).all(dim=1)
        else:
            scores = self.judge.score(rollout.sequences, rollout.group_size).cpu()
            valid = scores >= self.settings.judge_threshold
        return best_of_group(scores, 1, group_size=rollout.group_size, valid=valid).selected

    def _chosen(self, rollout: Rollout, selected: Tensor) -> Sequences:
        """The selected samples of all ranks, each with its own prompt."""
        completions = self.run.ranks.gather_samples(rollout.sequences.completions, rollout.group_size)
        prompts = self.run.encode_prompts(rollout.problem_of_each)
        rows = selected.to(completions.device)
        return make_sequences(prompts[rows], completions[rows])

    def facts(self) -> Record:
        return dict(self._facts)

    def tensors(self) -> dict[str, Tensor]:
        return {f"data/{name}": tensor for name, tensor in self.data._asdict().items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self.data = Sequences(*(tensors[f"data/{name}"].to(self.device) for name in Sequences._fields))
