"""One real training step of PPO and one of GRPO, with every model and every state that the two keep."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from examples.r1.choices import GENERAL
from examples.r1.measuring import ppo
from examples.r1.policy.model import CharTransformer
from examples.r1.policy.mtp import hidden_of_depths
from examples.r1.policy.rollout import generate
from examples.r1.policy.sequences import Sequences, make_sequences
from examples.r1.randomness import torch_rng
from examples.r1.run import Run
from examples.r1.stages.grpo import loss_config
from examples.r1.stages.judge import RewardModel
from examples.r1.stages.log_probs import sequence_log_probs
from grpo_kernels import GRPOLossConfig, PolicyTerms, group_advantages

PROMPTS, GROUP_SIZE, TOKENS = 2, 2, 8  # of the step: what it leaves behind does not depend on them


class Part:
    """One of a method's models, frozen or with all that training keeps of it.

    In float32 Adam works on the parameters. In mixed precision the parameters and their gradients are bfloat16; Adam
    and its moments belong to float32 copies, the master weights, and float32 gradients exist during its step alone.
    """

    def __init__(self, model: nn.Module, mixed: bool, learning_rate: float | None = None) -> None:
        self.model = model.to(torch.bfloat16) if mixed else model
        self.masters: list[Tensor] = []
        self.optimizer: torch.optim.Optimizer | None = None
        if learning_rate is None:
            self.model.requires_grad_(False)
            return
        self.parameters = list(self.model.parameters())
        if mixed:
            self.masters = [parameter.detach().float() for parameter in self.parameters]
        self.optimizer = torch.optim.Adam(self.masters or self.parameters, lr=learning_rate, betas=(0.9, 0.95))

    @torch.no_grad()
    def descend(self, loss: Tensor) -> None:
        """A step of the optimiser. The gradients stay until the next one, as in a training loop."""
        if self.optimizer is None:
            raise RuntimeError("the model is frozen")
        self.model.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        for master, parameter in zip(self.masters, self.parameters, strict=False):
            master.grad = None if parameter.grad is None else parameter.grad.float()
        self.optimizer.step()
        for master, parameter in zip(self.masters, self.parameters, strict=False):
            parameter.copy_(master)
            master.grad = None


Parts = dict[str, Part]


def train_grpo(run: Run, mixed: bool) -> Parts:
    """Policy, reference and reward model after a step with the loss of the run's options."""
    policy, parts = _common(run, mixed)
    batch = _sample(run, parts)
    advantages = group_advantages(batch.scores, group_size=GROUP_SIZE).advantages
    loss = _policy_loss(run, policy, batch, advantages, loss_config(run.settings), batch.ref_log_probs)
    parts["policy"].descend(loss)
    return parts


def train_ppo(run: Run, mixed: bool) -> Parts:
    """Policy, critic, reference and reward model after a step: clipped policy loss, GAE, value loss."""
    policy, common = _common(run, mixed)
    critic = ppo.Critic(policy.config).to(run.device)
    trained = Part(critic, mixed, run.settings.reasoning_learning_rate)
    parts = {"policy": common.pop("policy"), "critic": trained, **common}
    batch = _sample(run, parts)
    mask = batch.sequences.mask
    rewards = ppo.token_rewards(batch.scores, batch.old_log_probs, batch.ref_log_probs, mask, run.settings.kl_coef)
    with torch.no_grad():
        old_values = critic(batch.sequences).float()
    estimates = ppo.generalised_advantages(rewards, old_values, mask)
    clip = 0.2 if run.settings.clip is None else run.settings.clip
    advantages = ppo.whiten(estimates.advantages, mask)
    parts["policy"].descend(_policy_loss(run, policy, batch, advantages, GRPOLossConfig(clip_low=clip)))
    parts["critic"].descend(ppo.value_loss(critic(batch.sequences).float(), estimates.returns, mask))
    return parts


METHODS: dict[str, Callable[[Run, bool], Parts]] = {"ppo": train_ppo, "grpo": train_grpo}


class _Batch(NamedTuple):
    """Samples with what both methods ask of the frozen models."""

    sequences: Sequences
    old_log_probs: Tensor  # [B, C] float32
    ref_log_probs: Tensor  # [B, C] float32
    scores: Tensor  # [B] float32, of the reward model


def _common(run: Run, mixed: bool) -> tuple[CharTransformer, Parts]:
    """The policy, and what both methods have."""
    policy = run.build_policy()
    if policy.mtp is not None:
        policy.mtp.detach = "trunk"
    reference = copy.deepcopy(policy)
    reference.mtp = None  # it drafts nothing
    learning_rate = run.settings.reasoning_learning_rate
    parts = {
        "policy": Part(policy, mixed, learning_rate),
        "reference": Part(reference, mixed),
        "reward model": Part(run.build_judge(), mixed),
    }
    return policy, parts


def _sample(run: Run, parts: Parts) -> _Batch:
    """A small batch of the general task, whose answers a reward model scores."""
    policy, reference, judge = (parts[name].model for name in ("policy", "reference", "reward model"))
    prompts = run.encode_prompts(run.draw(GENERAL, PROMPTS, "compare with PPO"))
    generator = torch_rng(run.device, run.settings.seed, "compare with PPO")
    completions = generate(policy, prompts, TOKENS, group_size=GROUP_SIZE, generator=generator)
    sequences = make_sequences(prompts, completions.clone())
    log_probs = [sequence_log_probs(model, sequences, 1.0) for model in (policy, reference)]
    return _Batch(sequences, *log_probs, RewardModel(judge).score(sequences))


def _policy_loss(
    run: Run,
    policy: CharTransformer,
    batch: _Batch,
    advantages: Tensor,
    config: GRPOLossConfig,
    ref_log_probs: Tensor | None = None,
) -> Tensor:
    """The loss of a policy; if it drafts, with that of its drafts, as in the stages of RL."""
    prompts, completions, mask = batch.sequences
    head: Any = policy.head
    if policy.mtp is None:
        hidden = policy.completion_hidden(prompts, completions)
        arguments = (completions, batch.old_log_probs, advantages, mask, config)
        return head.grpo_loss(hidden, *arguments, ref_log_probs=ref_log_probs).loss
    terms = PolicyTerms(batch.old_log_probs, advantages, config, ref_log_probs=ref_log_probs)
    hiddens = hidden_of_depths(policy, prompts, completions)
    return head.mtp_cross_entropy(hiddens, completions, shift=0, mask=mask, policy=terms, detach_head=True).loss
