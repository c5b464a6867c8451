"""What the training stages share: a model, an optimiser, and steps that can be repeated from any checkpoint."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from examples.r1.errors import RunError
from examples.r1.policy.model import CharTransformer
from examples.r1.results import Record
from examples.r1.run import Run
from examples.r1.saving.model_folder import ModelFolder
from examples.r1.shards import clip_grad_norm_, sum_gradients
from examples.r1.stages.evaluation import evaluate


class Stage(ABC):
    """One stage of the pipeline. Step i depends on the parameters, the optimiser's state, the seed and i alone."""

    name: str
    warm_up = 10  # steps
    trains_policy = True

    def __init__(self, model: CharTransformer, run: Run, learning_rate: float) -> None:
        self.model = model
        self.run = run
        self.settings = run.settings
        self.learning_rate = learning_rate
        self.device = run.device
        self._policy_parameters = [value for name, value in model.named_parameters() if not name.startswith("mtp.")]
        self.optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, betas=(0.9, 0.95))

    @classmethod
    @abstractmethod
    def start(cls, run: Run, models: ModelFolder) -> Stage:
        """The stage before its first step; the models that it starts from come out of the folder."""

    @property
    def steps(self) -> int:
        """Steps of the whole stage."""
        steps: int = getattr(self.settings, f"{self.name}_steps")
        return steps

    @abstractmethod
    def step(self, index: int) -> Record:
        """Does one step and says how it went."""

    def begin(self) -> None:  # noqa: B027 - most stages have nothing to do
        """What comes before the first step, and is not repeated by a run that goes on from a later one."""

    def evaluate(self) -> Record:
        """How the model does on held-out problems."""
        return evaluate(self.model, self.run)

    def facts(self) -> Record:
        """Figures of the stage as a whole."""
        return {}

    def frozen_models(self) -> dict[str, CharTransformer]:
        """Other models that a checkpoint must hold."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """What else a checkpoint must hold."""
        return {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:  # noqa: B027 - most stages keep nothing
        """Takes `tensors` back."""

    def learning_rate_at(self, index: int) -> float:
        """Of step `index`: it rises over the first steps, and falls over the last half of the stage, to a tenth."""
        left = (self.steps - index) / max(self.steps, 1)
        return self.learning_rate * min(1.0, (index + 1) / self.warm_up, 0.1 + 1.8 * left)

    def descend(self, loss: Tensor, index: int) -> float:
        """One optimiser step on the sum of the ranks' losses; the norm of the policy's gradient before clipping.

        Raises RunError, and leaves the parameters as they are, if a gradient is NaN or infinite.
        """
        learning_rate = self.learning_rate_at(index)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        ranks, most = self.run.ranks, self.settings.max_grad_norm
        sum_gradients(ranks, self.model)
        norm = float(clip_grad_norm_(ranks, self.model, self._policy_parameters, most))
        drafts = 0.0
        if self.model.mtp is not None:  # by themselves, so that drafts never make the policy's steps smaller
            drafts = float(clip_grad_norm_(ranks, self.model, self.model.mtp.parameters(), most))
        if not math.isfinite(norm + drafts):  # the same on all ranks
            raise RunError(
                f"{self.name}, step {index + 1}: a gradient is NaN or infinite: training has diverged. "
                f"The learning rate of the step is {learning_rate:.3g}: try a lower one"
            )
        self.optimizer.step()
        return norm
