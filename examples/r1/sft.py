"""Cold start: supervised fine-tuning on a few noisy demonstrations."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from random import Random

import torch
from torch import Tensor

from examples.r1 import vocabulary
from examples.r1.model import CharTransformer
from examples.r1.rollout import Sequences, encode_prompts, make_sequences, python_rng
from examples.r1.routes import Routes
from examples.r1.settings import Settings
from examples.r1.stage import Record, Stage
from examples.r1.tasks import Problem, Task
from grpo_kernels import update_expert_bias

IGNORED = -100  # what cross-entropy leaves out


class SFTStage(Stage):
    """Maximises the log-probability of the demonstrations' completions."""

    name = "sft"

    def __init__(self, model: CharTransformer, task: Task, held_out: list[Problem], settings: Settings) -> None:
        super().__init__(model, task, held_out, settings, settings.sft_learning_rate)
        rng = python_rng(settings.seed, task.name, "demonstrations")
        problems = list(islice(task.training(rng, self.excluded_prompts), task.cold_examples))
        self.data = demonstrations(task, problems, rng, self.device)
        self.validation_data = demonstrations(task, held_out, python_rng(task.name, "validation"), self.device)

    @property
    def steps(self) -> int:
        return self.task.sft_steps if self.settings.sft_steps is None else self.settings.sft_steps

    def step(self, index: int) -> Record:
        rng = python_rng(self.settings.seed, self.task.name, self.name, index)
        rows = torch.tensor(rng.choices(range(len(self.data.prompts)), k=self.settings.sft_batch), device=self.device)
        batch = Sequences(*(tensor[rows] for tensor in self.data))
        if self.model.moe_layers:
            return self._balanced_step(batch, index)
        loss = self.loss(batch)
        norm = self.descend(loss, index)
        return {"loss": float(loss.detach()), "grad_norm": norm}

    def _balanced_step(self, batch: Sequences, index: int) -> Record:
        """A step of the MoE model, which also learns to use its experts evenly."""
        routes = Routes()
        loss = self.loss(batch, routes)
        aux_loss = routes.aux_loss()
        norm = self.descend(loss + aux_loss, index)
        for layer, loads in zip(self.model.moe_layers, routes.loads(), strict=True):
            if layer.e_score_correction_bias is not None:
                update_expert_bias(layer.e_score_correction_bias, loads, self.settings.bias_update_rate)
        record = {"loss": float(loss.detach()), "aux_loss": float(aux_loss.detach()), "grad_norm": norm}
        return record | {"expert_load": routes.metrics(self.settings.experts_per_token)["expert_load"]}

    def loss(self, batch: Sequences, routes: Routes | None = None) -> Tensor:
        """Cross-entropy, the mean over the completions' tokens."""
        hidden = self.model.completion_hidden(batch.prompts, batch.completions, routes)
        return self.model.head.cross_entropy(hidden, batch.completions.masked_fill(~batch.mask, IGNORED))

    @torch.no_grad()
    def validate(self) -> Record:
        """The loss on demonstrations of held-out problems, as noisy as those of training: nats a token.

        They are the same for every seed. The balance loss is not in it.
        """
        return {"validation_loss": float(self.loss(self.validation_data))}


def demonstrations(task: Task, problems: Sequence[Problem], rng: Random, device: torch.device) -> Sequences:
    """One noisy demonstration of each problem."""
    completions = [
        vocabulary.pad_right(
            [*vocabulary.encode(task.demonstrate(problem, rng)), vocabulary.END], task.completion_length
        )
        for problem in problems
    ]
    return make_sequences(encode_prompts(task, problems, device), torch.tensor(completions, device=device))
