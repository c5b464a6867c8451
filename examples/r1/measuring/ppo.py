"""What PPO has beside a policy: a critic, its loss, and advantages made of its values."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from examples.r1.policy.model import CharTransformer, ModelConfig
from examples.r1.policy.sequences import Sequences

GAMMA = 1.0  # every token counts alike
LAMBDA = 0.95  # of generalised advantage estimation (arXiv 1506.02438)


class Critic(nn.Module):
    """A transformer like the policy's, with one number a token in place of the head, and no drafts."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.transformer = CharTransformer(replace(config, mtp=0))
        del self.transformer.head
        self.value = nn.Linear(config.width, 1, bias=False)

    def forward(self, sequences: Sequences) -> Tensor:
        """Values [B, C]: what a sample is expected to earn from token t on, seen before token t."""
        hidden = self.transformer.completion_hidden(sequences.prompts, sequences.completions)
        values: Tensor = self.value(hidden).squeeze(-1)
        return values


class Estimates(NamedTuple):
    """Of every token of the samples, [B, C] float; 0 behind their ends."""

    advantages: Tensor
    returns: Tensor  # what the critic learns


def token_rewards(scores: Tensor, old_log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """[B, C]: the score [B] at a sample's last token, and at each the penalty kl_coef (log pi_old - log pi_ref)."""
    penalties = (kl_coef * (ref_log_probs - old_log_probs)).masked_fill(~mask, 0.0)
    last = mask & ~torch.cat((mask[:, 1:], torch.zeros_like(mask[:, :1])), dim=1)
    return penalties + torch.where(last, scores.unsqueeze(1), 0.0)


def generalised_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = GAMMA, lam: float = LAMBDA
) -> Estimates:
    """GAE of rewards and values [B, C] over the tokens of mask [B, C], which are the first ones of each row.

    delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}, with zeros behind the last token; the return
    is A_t + V_t.
    """
    values, rewards = values.masked_fill(~mask, 0.0), rewards.masked_fill(~mask, 0.0)
    deltas = rewards - values
    deltas[:, :-1] += gamma * values[:, 1:]
    advantages = torch.zeros_like(values)
    ahead = values.new_zeros(len(values))
    for column in reversed(range(values.shape[1])):
        ahead = deltas[:, column] + gamma * lam * ahead
        advantages[:, column] = ahead
    return Estimates(advantages, advantages + values)


def whiten(advantages: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the tokens of the mask; 0 elsewhere."""
    count = mask.sum().clamp(min=1)
    advantages = advantages.masked_fill(~mask, 0.0)
    centred = (advantages - advantages.sum() / count).masked_fill(~mask, 0.0)
    return centred * torch.rsqrt(centred.square().sum() / count + 1e-8)


def value_loss(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Half the mean squared error over the tokens of the mask."""
    return 0.5 * (values - returns).masked_fill(~mask, 0.0).square().sum() / mask.sum().clamp(min=1)
