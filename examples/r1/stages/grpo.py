"""Group-relative policy optimisation: stage 2 with rewards by rule, stage 4 with those of a reward model among them."""

from __future__ import annotations

import copy
from abc import abstractmethod
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from examples.r1.choices import GENERAL, REASONING
from examples.r1.policy.model import CharTransformer
from examples.r1.policy.mtp import hidden_of_depths, record_of
from examples.r1.policy.rollout import Rollout, roll_out
from examples.r1.policy.routes import Routes
from examples.r1.policy.sequences import Sequences, rows_of_groups
from examples.r1.randomness import stream_seed, torch_rng
from examples.r1.results import Record
from examples.r1.run import Run
from examples.r1.saving.model_folder import ModelFolder
from examples.r1.settings import Settings
from examples.r1.stages import rewards
from examples.r1.stages.evaluation import evaluate
from examples.r1.stages.judge import RewardModel
from examples.r1.stages.log_probs import sequence_log_probs
from examples.r1.stages.stage import Stage
from examples.r1.tasks import Problem
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

_LOGGED = ("kl", "entropy", "ratio_max", "clip_low_fraction", "clip_high_fraction", "clip_fraction")


class LossInputs(NamedTuple):
    """All that the loss of this rank's rows needs beside the policy's hidden states and its head."""

    sequences: Sequences
    old_log_probs: Tensor  # [B, C] float32
    ref_log_probs: Tensor  # [B, C] float32
    advantages: Tensor  # [B] float32
    routes: Routes | None = None  # of an MoE model, for every pass over the rows
    num_items: Tensor | None = None  # 0-d, what the loss of these rows is divided by, if it was counted before

    def select(self, groups: slice) -> LossInputs:
        """These groups, whole."""
        rows = rows_of_groups(groups, self.sequences.group_size)
        sequences = self.sequences.select(groups)
        routes = None if self.routes is None else self.routes.select(groups, len(self.sequences.prompts))
        return LossInputs(sequences, self.old_log_probs[rows], self.ref_log_probs[rows], self.advantages[rows], routes)


class Samples(NamedTuple):
    """The groups that a step learns from, with their rewards."""

    rollout: Rollout
    rewards: Tensor  # [B, 4] float32, in the order of `rewards.NAMES`: of all ranks
    informative: float  # share of all sampled groups whose rewards differ
    rounds: int  # of sampling
    seen: Record  # figures of all groups that were sampled, those that were not chosen among them


def loss_config(settings: Settings) -> GRPOLossConfig:
    """The preset of the settings, with what they change of it."""
    changes: dict[str, Any] = {"kl_coef": settings.kl_coef}
    if settings.clip is not None:
        changes |= {"clip_low": settings.clip, "clip_high": settings.clip}
    return GRPOLossConfig.preset(settings.preset, **changes)


class RLStage(Stage):
    """Samples a group of completions per prompt, scores them and reinforces what beats its group's mean."""

    temperature: float
    most_rounds: int  # of sampling in a step

    def __init__(
        self, model: CharTransformer, run: Run, learning_rate: float, judge: RewardModel | None = None
    ) -> None:
        super().__init__(model, run, learning_rate)
        self.loss_config = loss_config(run.settings)
        self.judge = judge
        self.reference = copy.deepcopy(model).requires_grad_(False)
        self.reference.mtp = None  # it drafts nothing
        if model.mtp is not None:
            model.mtp.detach = "trunk"
        self.experts = model.config.experts
        self.reward_weights = torch.tensor(rewards.WEIGHTS, device=self.device)

    def evaluate(self) -> Record:
        return evaluate(self.model, self.run, self.judge)

    def frozen_models(self) -> dict[str, CharTransformer]:
        return {"reference": self.reference}

    @abstractmethod
    def problems(self, index: int, round_: int) -> list[Problem]:
        """The prompts of a round of step `index`."""

    def step(self, index: int) -> Record:
        start = perf_counter()
        samples = self.sample(index)
        sampled = perf_counter()
        inputs = self.loss_inputs(samples, index)
        record = self.update(inputs, index)
        if inputs.routes is not None:
            record["rollout_mismatch"] = self._route_metrics(inputs.routes)["route_mismatch"]
        done = perf_counter()
        return {
            **samples.seen,
            **record,
            "informative": samples.informative,
            "rounds": float(samples.rounds),
            "tokens": self.run.ranks.total(samples.rollout.sequences.mask.sum()),
            "sample_seconds": sampled - start,
            "train_seconds": done - sampled,
        }

    def _figures(self, rollout: Rollout, table: Tensor) -> Record:
        """Means of what scored all groups that were sampled. Those of the chosen ones are not the policy's own."""
        record = {"reward": float(rewards.totals(table).mean()), **rollout.means()}
        for column in (rewards.FORMAT, rewards.LANGUAGE, rewards.JUDGE):
            values = table[:, column]
            if not bool(values.isnan().all()):
                record[rewards.NAMES[column]] = float(values.nanmean())
        drafts = {} if rollout.drafts is None else rollout.drafts.record()
        return record | drafts | {"sampled_tokens": self.run.ranks.total(rollout.sequences.mask.sum())}

    def sample(self, index: int) -> Samples:
        """The scored samples of step `index`, from the policy as it is now.

        DAPO's dynamic sampling: while groups are missing whose rewards differ, further prompts are sampled, up to the
        rounds of the settings; then groups that teach nothing fill the batch up.
        """
        wanted = self.settings.prompts
        rollout, table = self._sample_round(index, 0)
        useful = self._informative(table)
        rounds = 1
        while rounds < self.most_rounds and int(useful.sum()) < wanted:
            more, more_table = self._sample_round(index, rounds)
            rollout, table = rollout.followed_by(more), torch.cat((table, more_table))
            useful = self._informative(table)
            rounds += 1
        order = torch.sort(useful.logical_not(), stable=True).indices[:wanted].sort().values
        rows = rows_of_groups(order, self.settings.group_size)
        chosen = rollout if len(order) == len(useful) else rollout.select(order)
        informative = float(useful.float().mean())
        return Samples(chosen, table[rows], informative, rounds, self._figures(rollout, table))

    def _informative(self, table: Tensor) -> Tensor:
        """[N] bool: the groups whose samples differ in what they are asked for: accuracy, or the judge's score."""
        asked = torch.where(table[:, rewards.JUDGE].isnan(), table[:, rewards.ACCURACY], table[:, rewards.JUDGE])
        size = self.settings.group_size
        return informative_groups(asked, group_size=size, tolerance=1e-3).view(-1, size)[:, 0]

    def _sample_round(self, index: int, round_: int) -> tuple[Rollout, Tensor]:
        rollout = roll_out(
            self.model,
            self.run,
            self.problems(index, round_),
            group_size=self.settings.group_size,
            temperature=self.temperature,
            generator=torch_rng(self.device, self.settings.seed, self.name, index, round_),
            record_routes=self.experts > 0 and self.settings.replay == "rollout",
        )
        judged = None if self.judge is None else self.judge.score(rollout.sequences, rollout.group_size)
        return rollout, rewards.training_rewards(rollout.rulings, rollout.problem_of_each, judged)

    def loss_inputs(self, samples: Samples, index: int) -> LossInputs:
        """Advantages, and the log-probabilities under the policy that sampled and under the reference."""
        scores, rollout = samples.rewards, samples.rollout
        if self.settings.shuffle_rewards:
            source = (self.settings.seed, self.name, index)
            scores = shuffle_in_groups(scores, self.settings.group_size, *source)
        advantages = self._advantages(scores)
        routes = self._routes(rollout)
        again = None if routes is None else routes.again()
        old = rollout.log_probs
        if old is None or self.experts:  # the pass also records routes, or says how they differ
            old = sequence_log_probs(self.model, rollout.sequences, self.temperature, routes)
        ref = sequence_log_probs(self.reference, rollout.sequences, self.temperature, again)
        return LossInputs(rollout.sequences, old, ref, advantages, routes)

    def _advantages(self, scores: Tensor) -> Tensor:
        """[B / ranks], of this rank's samples, from the rewards [B, 4] of all. Groups straddle the ranks."""
        ranks, size = self.run.ranks, self.settings.group_size
        own = ranks.own_samples(scores, size).to(self.device)
        groups = torch.arange(len(scores) // size, device=self.device).repeat_interleave(ranks.own_group(size))
        return group_advantages(
            own,
            group_ids=groups,
            reward_weights=self.reward_weights,
            aggregation=self.settings.aggregation,
            process_group=ranks.process_group,
        ).advantages

    def _route_metrics(self, routes: Routes) -> Record:
        return routes.metrics(self.settings.experts_per_token, self.run.ranks, self.settings.group_size)

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
        torch.manual_seed(stream_seed(self.settings.seed, self.name, index, "loss"))  # clip_cov draws tokens
        for start in range(0, prompts, size):
            part = inputs.select(slice(start, start + size))
            routes = part.routes or Routes()
            loss, metrics, record = self._objective(part, routes)
            record["grad_norm"] = self.descend(loss, index)
            found = metrics.to_dict()
            record |= {name: found[name] for name in _LOGGED}
            if self.experts:
                record |= self._route_metrics(routes)
        return record

    def _objective(self, inputs: LossInputs, routes: Routes) -> tuple[Tensor, GRPOMetrics, Record]:
        """What an update minimises: the policy's loss; if the model drafts, with it those of the deeper depths.

        They learn from the samples as they come, so that acceptance keeps up with the policy. Their gradients end at
        the model's hidden states, embeddings and head: they imitate whatever was sampled, good or bad, and what
        imitation would do to the policy, the advantages did not ask for.
        """
        sequences, ranks = inputs.sequences, self.run.ranks
        if self.model.mtp is None:
            hidden = self.model.completion_hidden(sequences.prompts, sequences.completions, routes)
            output = self.loss(self.model.head, hidden, inputs)
            return output.loss, self._of_all(output.metrics), {"loss": ranks.total(output.loss)}
        policy = PolicyTerms(
            inputs.old_log_probs,
            inputs.advantages,
            self.loss_config,
            ref_log_probs=inputs.ref_log_probs,
            num_items=self.num_items(sequences.mask),
        )
        tokens = ranks.sum_(sequences.mask.sum()).to(self.model.head.weight.dtype)
        depths = self.model.head.mtp_cross_entropy(
            hidden_of_depths(self.model, sequences.prompts, sequences.completions, routes),
            sequences.completions,
            shift=0,
            mask=sequences.mask,
            num_items=tokens,
            policy=policy,
            detach_head=True,
            temperature=self.temperature,
        )
        if depths.metrics is None:
            raise RuntimeError("the loss of a policy comes with its metrics")
        record = {"loss": ranks.total(depths.depth_losses[0]), **record_of(depths, tokens, ranks)}
        return depths.loss, self._of_all(depths.metrics), record

    def _of_all(self, metrics: GRPOMetrics) -> GRPOMetrics:
        """Those of the samples of all ranks."""
        group = self.run.ranks.process_group
        return metrics if group is None else metrics.all_reduce(group)

    def num_items(self, mask: Tensor) -> Tensor:
        """What the preset divides the loss by: tokens or sequences, of all ranks."""
        by_token = self.loss_config.reduction == "token_mean"
        count = mask.sum() if by_token else torch.tensor(len(mask), device=mask.device)
        return self.run.ranks.sum_(count).to(self.model.head.weight.dtype)

    def loss(self, head: FusedLMHead, hidden: Tensor, inputs: LossInputs) -> GRPOLossOutput:
        """The policy's loss on this rank's samples, which the samples of all ranks divide."""
        return head.grpo_loss(
            hidden,
            inputs.sequences.completions,
            inputs.old_log_probs,
            inputs.advantages,
            inputs.sequences.mask,
            self.loss_config,
            ref_log_probs=inputs.ref_log_probs,
            num_items=self.num_items(inputs.sequences.mask) if inputs.num_items is None else inputs.num_items,
            temperature=self.temperature,
        )


class ReasoningRL(RLStage):
    """Rewards by rule alone, on the task that has a rule."""

    name = "reasoning_rl"

    @classmethod
    def start(cls, run: Run, models: ModelFolder) -> ReasoningRL:
        return cls(models.load("cold_start", run.build_policy()), run)

    def __init__(self, model: CharTransformer, run: Run) -> None:
        super().__init__(model, run, run.settings.reasoning_learning_rate)
        self.temperature = run.settings.reasoning_temperature
        self.most_rounds = run.settings.dynamic_sampling

    def problems(self, index: int, round_: int) -> list[Problem]:
        return self.run.draw(REASONING, self.settings.prompts, self.name, index, round_)


class DiverseRL(RLStage):
    """Both tasks in every batch: rules where there are any, the reward model elsewhere."""

    name = "diverse_rl"

    @classmethod
    def start(cls, run: Run, models: ModelFolder) -> DiverseRL:
        return cls(models.load("rejection_sampling", run.build_policy()), run, RewardModel.trained(run, models))

    def __init__(self, model: CharTransformer, run: Run, judge: RewardModel) -> None:
        super().__init__(model, run, run.settings.diverse_learning_rate, judge)
        self.temperature = run.settings.diverse_temperature
        self.most_rounds = run.settings.diverse_dynamic_sampling

    def problems(self, index: int, round_: int) -> list[Problem]:
        half = self.settings.prompts // 2
        reasoning = self.run.draw(REASONING, self.settings.prompts - half, self.name, index, round_)
        general = self.run.draw(GENERAL, half, self.name, index, round_)
        return [problem for pair in zip(reasoning, general, strict=False) for problem in pair] + reasoning[half:]


def shuffle_in_groups(scores: Tensor, group_size: int, *source: object) -> Tensor:
    """The same rewards [B, R] with the rows of every group in an order that is a function of the source."""
    generator = torch_rng(scores.device, "shuffle", *source)
    groups = scores.view(-1, group_size, scores.shape[1])
    order = torch.rand(groups.shape[:2], generator=generator).argsort(dim=1)
    return groups.gather(1, order.unsqueeze(-1).expand_as(groups)).reshape(scores.shape)
