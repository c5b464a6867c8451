"""Cold start: supervised fine-tuning on a few noisy demonstrations."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from random import Random

import torch
from torch import Tensor

from examples.r1 import vocabulary
from examples.r1.model import CharTransformer
from examples.r1.mtp import hidden_of_depths, record_of
from examples.r1.rollout import Sequences, encode_prompts, make_sequences, python_rng
from examples.r1.routes import Routes
from examples.r1.settings import Settings
from examples.r1.stage import Record, Stage
from examples.r1.tasks import Problem, Task
from grpo_kernels import update_expert_bias

IGNORED = -100  # what cross-entropy leaves out


class SFTStage(Stage):
    """Maximises the log-probability of the demonstrations' completions, and of what comes after the next token."""

    name = "sft"

    def __init__(self, model: CharTransformer, task: Task, held_out: list[Problem], settings: Settings) -> None:
        super().__init__(model, task, held_out, settings, settings.sft_learning_rate)
        if model.mtp is not None:
            model.mtp.detach = "none"  # what helps to foresee later tokens, the model shall learn too
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
        loss, record = self._objective(batch)
        return record | {"grad_norm": self.descend(loss, index)}

    def _balanced_step(self, batch: Sequences, index: int) -> Record:
        """A step of the MoE model, which also learns to use its experts evenly."""
        routes = Routes()
        loss, record = self._objective(batch, routes)
        aux_loss = routes.aux_loss()
        norm = self.descend(loss + aux_loss, index)
        for layer, loads in zip(self.model.moe_layers, routes.loads(), strict=True):
            if layer.e_score_correction_bias is not None:
                update_expert_bias(layer.e_score_correction_bias, loads, self.settings.bias_update_rate)
        record |= {"aux_loss": float(aux_loss.detach()), "grad_norm": norm}
        return record | {"expert_load": routes.metrics(self.settings.experts_per_token)["expert_load"]}

    def _objective(self, batch: Sequences, routes: Routes | None = None) -> tuple[Tensor, Record]:
        """What a step minimises: the loss, and with it those of the deeper depths if the model has any."""
        if self.model.mtp is None:
            loss = self.loss(batch, routes)
            return loss, {"loss": float(loss.detach())}
        hiddens = hidden_of_depths(self.model, batch.prompts, batch.completions, routes)
        output = self.model.head.mtp_cross_entropy(hiddens, batch.completions, shift=0, mask=batch.mask)
        return output.loss, {"loss": float(output.depth_losses[0]), **record_of(output)}

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
