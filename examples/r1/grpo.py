"""Group-relative policy optimisation with rule-based rewards."""

from __future__ import annotations

import copy
from itertools import islice
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from examples.r1 import rewards
from examples.r1.log_probs import sequence_log_probs
from examples.r1.model import CharTransformer
from examples.r1.mtp import hidden_of_depths, record_of
from examples.r1.rollout import Rollout, Sequences, python_rng, roll_out, torch_rng
from examples.r1.routes import Routes
from examples.r1.settings import Settings
from examples.r1.stage import Record, Stage
from examples.r1.tasks import Problem, Task
from grpo_kernels import (
    FusedLMHead,
    GRPOLossConfig,
    GRPOLossOutput,
    GRPOMetrics,
    PolicyTerms,
    RouterReplay,
    group_advantages,
    informative_groups,
)

_LOGGED = ("kl", "entropy", "ratio_max", "clip_fraction")


class LossInputs(NamedTuple):
    """All that the loss of some rows needs beside the policy's hidden states and its head."""

    sequences: Sequences
    old_log_probs: Tensor  # [B, C] float32
    ref_log_probs: Tensor  # [B, C] float32
    advantages: Tensor  # [B] float32
    routes: Routes | None = None  # of an MoE model, for every pass over the rows

    def groups(self, start: int, end: int) -> LossInputs:
        """Groups start to end, whole."""
        size = len(self.advantages) // len(self.sequences.prompts)
        rows = slice(start * size, end * size)
        sequences = self.sequences.groups(start, end)
        routes = None if self.routes is None else self.routes.groups(start, end, len(self.sequences.prompts))
        return LossInputs(sequences, self.old_log_probs[rows], self.ref_log_probs[rows], self.advantages[rows], routes)


class GRPOStage(Stage):
    """Samples a group of completions per prompt, scores them by rule and reinforces what beats its group's mean."""

    name = "grpo"

    def __init__(self, model: CharTransformer, task: Task, held_out: list[Problem], settings: Settings) -> None:
        super().__init__(model, task, held_out, settings, settings.grpo_learning_rate)
        self.loss_config = GRPOLossConfig.preset(
            "grpo", clip_low=settings.clip, clip_high=settings.clip, kl_coef=settings.kl_coef
        )
        self.reference = copy.deepcopy(model).requires_grad_(False)
        self.reference.mtp = None  # it drafts nothing
        if model.mtp is not None:
            model.mtp.detach = "trunk"
        self.experts = model.config.experts
        self.reward_weights = torch.tensor(rewards.WEIGHTS, device=self.device)

    @property
    def steps(self) -> int:
        return self.task.grpo_steps if self.settings.grpo_steps is None else self.settings.grpo_steps

    def frozen_models(self) -> dict[str, CharTransformer]:
        return {"reference": self.reference}

    def step(self, index: int) -> Record:
        start = perf_counter()
        rollout = self.sample(index)
        sampled = perf_counter()
        inputs = self.loss_inputs(rollout, index)
        record = self.update(inputs, index)
        if inputs.routes is not None:
            record["rollout_mismatch"] = inputs.routes.metrics(self.settings.experts_per_token)["route_mismatch"]
        done = perf_counter()
        informative = informative_groups(rollout.totals(), group_size=self.settings.group_size)
        return {
            "reward": float(rollout.totals().mean()),
            **rollout.means(),
            **record,
            **({} if rollout.drafts is None else rollout.drafts.record()),
            "informative": float(informative.float().mean()),
            "tokens": float(rollout.generated_tokens),
            "sample_seconds": sampled - start,
            "train_seconds": done - sampled,
        }

    def sample(self, index: int) -> Rollout:
        """The scored samples of step `index`, from the policy as it is now."""
        source = (self.settings.seed, self.task.name, self.name, index)
        problems = list(islice(self.task.training(python_rng(*source), self.excluded_prompts), self.settings.prompts))
        return roll_out(
            self.model,
            self.task,
            problems,
            group_size=self.settings.group_size,
            temperature=self.settings.temperature,
            generator=torch_rng(self.device, *source),
            record_routes=self.experts > 0 and self.settings.replay == "rollout",
        )

    def loss_inputs(self, rollout: Rollout, index: int) -> LossInputs:
        """Advantages, and the log-probabilities under the policy that sampled and under the reference."""
        scores = rollout.rewards
        if self.settings.shuffle_rewards:
            scores = shuffle_in_groups(scores, self.settings.group_size, index)
        advantages = group_advantages(
            scores.to(self.device), group_size=self.settings.group_size, reward_weights=self.reward_weights
        ).advantages
        routes = self._routes(rollout)
        again = None if routes is None else routes.again()
        old = rollout.log_probs
        if old is None or self.experts:  # the pass also records routes, or says how they differ
            old = sequence_log_probs(self.model, rollout.sequences, self.settings.temperature, routes)
        ref = sequence_log_probs(self.reference, rollout.sequences, self.settings.temperature, again)
        return LossInputs(rollout.sequences, old, ref, advantages, routes)

    def _routes(self, rollout: Rollout) -> Routes | None:
        """Those of the rollout, or objects that the pass of the old log-probs fills; None if every pass routes anew."""
        if self.experts == 0 or self.settings.replay == "off":
            return None
        return rollout.routes or Routes(RouterReplay(self.experts), RouterReplay(self.experts))

    def update(self, inputs: LossInputs, index: int) -> Record:
        """The rollout's optimiser steps; metrics are those of the last one, where the ratios are furthest from 1."""
        prompts = len(inputs.sequences.prompts)
        size = -(-prompts // self.settings.updates_per_rollout)
        record: Record = {}
        for start in range(0, prompts, size):
            part = inputs.groups(start, start + size)
            routes = part.routes or Routes()
            loss, metrics, record = self._objective(part, routes)
            record["grad_norm"] = self.descend(loss, index)
            found = metrics.to_dict()
            record |= {name: found[name] for name in _LOGGED}
            if self.experts:
                record |= routes.metrics(self.settings.experts_per_token)
        return record

    def _objective(self, inputs: LossInputs, routes: Routes) -> tuple[Tensor, GRPOMetrics, Record]:
        """What an update minimises: the policy's loss; if the model drafts, with it those of the deeper depths.

        They learn from the samples as they come, so that acceptance keeps up with the policy. Their gradients end at
        the model's hidden states, embeddings and head: they imitate whatever was sampled, good or bad, and what
        imitation would do to the policy, the advantages did not ask for.
        """
        sequences = inputs.sequences
        if self.model.mtp is None:
            hidden = self.model.completion_hidden(sequences.prompts, sequences.completions, routes)
            output = self.loss(self.model.head, hidden, inputs)
            return output.loss, output.metrics, {"loss": float(output.loss.detach())}
        policy = PolicyTerms(
            inputs.old_log_probs, inputs.advantages, self.loss_config, ref_log_probs=inputs.ref_log_probs
        )
        depths = self.model.head.mtp_cross_entropy(
            hidden_of_depths(self.model, sequences.prompts, sequences.completions, routes),
            sequences.completions,
            shift=0,
            mask=sequences.mask,
            policy=policy,
            detach_head=True,
            temperature=self.settings.temperature,
        )
        if depths.metrics is None:
            raise RuntimeError("the loss of a policy comes with its metrics")
        return depths.loss, depths.metrics, {"loss": float(depths.depth_losses[0]), **record_of(depths)}

    def loss(self, head: FusedLMHead, hidden: Tensor, inputs: LossInputs) -> GRPOLossOutput:
        return head.grpo_loss(
            hidden,
            inputs.sequences.completions,
            inputs.old_log_probs,
            inputs.advantages,
            inputs.sequences.mask,
            self.loss_config,
            ref_log_probs=inputs.ref_log_probs,
            temperature=self.settings.temperature,
        )


def shuffle_in_groups(scores: Tensor, group_size: int, index: int) -> Tensor:
    """The same rewards [B, R] with the rows of every group in random order."""
    generator = torch_rng(scores.device, "shuffle", index)
    groups = scores.view(-1, group_size, scores.shape[1])
    order = torch.rand(groups.shape[:2], generator=generator).argsort(dim=1)
    return groups.gather(1, order.unsqueeze(-1).expand_as(groups)).reshape(scores.shape)
