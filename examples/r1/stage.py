"""What the training stages share: a model, an optimiser, and steps that can be repeated from any checkpoint."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from examples.r1.model import CharTransformer
from examples.r1.settings import Settings
from examples.r1.tasks import Problem, Task

Record = dict[str, float]


class Stage(ABC):
    """One stage of the pipeline. Step i depends on the parameters, the optimiser's state, the seed and i alone."""

    name: str
    warm_up = 10  # steps

    def __init__(
        self, model: CharTransformer, task: Task, held_out: list[Problem], settings: Settings, learning_rate: float
    ) -> None:
        self.model = model
        self.task = task
        self.settings = settings
        self.learning_rate = learning_rate
        self.device = model.head.weight.device
        self.excluded_prompts = frozenset(problem.prompt for problem in held_out)
        self._policy_parameters = [value for name, value in model.named_parameters() if not name.startswith("mtp.")]
        self.optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, betas=(0.9, 0.95))

    @property
    @abstractmethod
    def steps(self) -> int:
        """Steps of the whole stage."""

    @abstractmethod
    def step(self, index: int) -> Record:
        """Does one step and says how it went."""

    def validate(self) -> Record:
        """What held-out problems say of the stage's own objective, beside the accuracy of samples."""
        return {}

    def frozen_models(self) -> dict[str, CharTransformer]:
        """Other models that a checkpoint must hold."""
        return {}

    def descend(self, loss: Tensor, index: int) -> float:
        """One optimiser step; returns the norm of the policy's gradient before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * min(1.0, (index + 1) / self.warm_up)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(self._policy_parameters, self.settings.max_grad_norm)
        if self.model.mtp is not None:  # by themselves, so that drafts never make the policy's steps smaller
            torch.nn.utils.clip_grad_norm_(self.model.mtp.parameters(), self.settings.max_grad_norm)
        self.optimizer.step()
        return float(norm)
