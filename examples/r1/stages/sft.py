"""Supervised fine-tuning: the cold start, and what it shares with the other stages that imitate."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import torch
from torch import Tensor

from examples.r1.policy.model import CharTransformer
from examples.r1.policy.mtp import hidden_of_depths, record_of
from examples.r1.policy.routes import Routes
from examples.r1.policy.sequences import Sequences, make_sequences
from examples.r1.randomness import python_rng
from examples.r1.results import Record
from examples.r1.run import Run
from examples.r1.saving.model_folder import ModelFolder
from examples.r1.stages.stage import Stage
from examples.r1.tasks import Problem
from grpo_kernels import update_expert_bias

IGNORED = -100  # what cross-entropy leaves out


class SFTStage(Stage):
    """Maximises the log-probability of the completions in `data`, and of what comes after the next token."""

    data: Sequences  # one completion a prompt
    validation_data: Sequences

    def __init__(self, model: CharTransformer, run: Run) -> None:
        super().__init__(model, run, run.settings.sft_learning_rate)
        if model.mtp is not None:
            model.mtp.detach = "none"  # what helps to foresee later tokens, the model shall learn too

    def step(self, index: int) -> Record:
        start = perf_counter()
        rng = python_rng(self.settings.seed, self.name, index)
        rows = torch.tensor(rng.choices(range(len(self.data.prompts)), k=self.settings.sft_batch), device=self.device)
        ranks = self.run.ranks
        batch = self.data.select(rows[ranks.part("sft_batch", len(rows))])
        routes = Routes() if self.model.moe_layers else None
        loss, record = self._objective(batch, routes)
        if routes is None:
            record["grad_norm"] = self.descend(loss, index)
        else:
            record |= self._descend_in_balance(loss, routes, index)
        return record | {"tokens": ranks.total(batch.mask.sum()), "seconds": perf_counter() - start}

    def _descend_in_balance(self, loss: Tensor, routes: Routes, index: int) -> Record:
        """A step of the MoE model, which also learns to use its experts evenly."""
        ranks, rate = self.run.ranks, self.settings.bias_update_rate
        balance_loss = routes.balance_loss() / ranks.world  # a mean over sequences, of which each has as many
        norm = self.descend(loss + balance_loss, index)
        for layer, loads in zip(self.model.moe_layers, routes.loads(), strict=True):
            if layer.e_score_correction_bias is not None:
                update_expert_bias(layer.e_score_correction_bias, loads, rate, ranks.process_group)
        load = routes.metrics(self.settings.experts_per_token, ranks)["expert_load"]
        return {"balance_loss": ranks.total(balance_loss), "grad_norm": norm, "expert_load": load}

    def _objective(self, batch: Sequences, routes: Routes | None = None) -> tuple[Tensor, Record]:
        """What a step minimises: the loss, and with it those of the deeper depths if the model has any."""
        ranks = self.run.ranks
        if self.model.mtp is None:
            loss = self.loss(batch, routes)
            return loss, {"loss": ranks.total(loss)}
        hiddens = hidden_of_depths(self.model, batch.prompts, batch.completions, routes)
        tokens = ranks.sum_(batch.mask.sum())
        output = self.model.head.mtp_cross_entropy(
            hiddens, batch.completions, shift=0, mask=batch.mask, num_items=tokens.to(hiddens[0].dtype)
        )
        return output.loss, {"loss": ranks.total(output.depth_losses[0]), **record_of(output, tokens, ranks)}

    def loss(self, batch: Sequences, routes: Routes | None = None) -> Tensor:
        """Cross-entropy, the mean over the completions' tokens; of several ranks each gives its part of the mean."""
        hidden = self.model.completion_hidden(batch.prompts, batch.completions, routes)
        targets = batch.completions.masked_fill(~batch.mask, IGNORED)
        total = self.model.head.cross_entropy(hidden, targets, reduction="sum")
        return total / self.run.ranks.sum_(batch.mask.sum()).clamp(min=1)

    @torch.no_grad()
    def validation_loss(self) -> float:
        """The loss on completions of held-out problems, nats a token. The balance loss is not in it."""
        data, ranks = self.validation_data, self.run.ranks
        own = ranks.part("evaluation_prompts", len(data.prompts))
        return ranks.total(self.loss(data.select(own)))

    def evaluate(self) -> Record:
        return super().evaluate() | {"validation_loss": self.validation_loss()}


class ColdStart(SFTStage):
    """Imitates a few noisy demonstrations of both tasks."""

    name = "cold_start"

    @classmethod
    def start(cls, run: Run, models: ModelFolder) -> ColdStart:
        return cls(run.build_policy(), run)

    def __init__(self, model: CharTransformer, run: Run) -> None:
        super().__init__(model, run)
        problems = [
            problem for name, task in run.tasks.items() for problem in run.draw(name, task.cold_examples, self.name)
        ]
        self.data = demonstrations(run, problems, run.settings.seed, self.name)
        self.validation_data = demonstrations(run, run.all_held_out, "validation")


def demonstrations(run: Run, problems: Sequence[Problem], *source: object) -> Sequences:
    """One noisy demonstration of each problem, the same for equal sources."""
    rng = python_rng(*source)
    return write_down(run, problems, [run.tasks[problem.task].demonstrate(problem, rng) for problem in problems])


def solutions(run: Run, problems: Sequence[Problem]) -> Sequences:
    """The completion of each problem that is right in everything."""
    return write_down(run, problems, [run.tasks[problem.task].solve(problem) for problem in problems])


def write_down(run: Run, problems: Sequence[Problem], texts: Sequence[str]) -> Sequences:
    """Problems with a completion each."""
    return make_sequences(run.encode_prompts(problems), run.encode_completions(texts))
