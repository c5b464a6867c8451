"""Inputs for verl's functions and for ours, the same on every machine, and the cases that are recorded of verl."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

BATCH, TOKENS = 6, 7
LENGTHS = (7, 3, 0, 5, 1, 6)
UIDS = ("a", "b", "a", "b", "a", "c")  # the last group has one sample
# verl adds 1e-8 to the counts that it divides by, so that its own values are off by this much at most.
VERL_RELATIVE_ERROR = 2e-8


def wave(frequency: float, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Numbers without a generator, which could change between versions of torch."""
    steps = torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float64)
    return ((steps * frequency).sin() * scale).reshape(shape).to(dtype)


class LossInputs(NamedTuple):
    """What verl's actor passes to a policy loss, [BATCH, TOKENS] each."""

    old_log_prob: Tensor
    log_prob: Tensor
    advantages: Tensor
    response_mask: Tensor
    rollout_is_weights: Tensor


def response_mask() -> Tensor:
    """Ragged rows; one without a token, one with a hole, as multi-turn rollouts have."""
    mask = torch.arange(TOKENS) < torch.tensor(LENGTHS)[:, None]
    mask[3, 1] = False
    return mask


def loss_inputs() -> LossInputs:
    """Ratios on both sides of every clip, two beyond verl's clamp of 20 nats; advantages of both signs."""
    shape = (BATCH, TOKENS)
    old = -2.5 + wave(1.7, *shape, scale=2.0)
    gap = wave(2.9, *shape, scale=0.9)
    gap[0, 1], gap[3, 2] = 23.0, -24.0
    old[0, 1] = -25.0
    advantages = wave(0.8, BATCH, 1, scale=1.5).expand(shape).contiguous()
    return LossInputs(old, old + gap, advantages, response_mask(), 1.0 + wave(3.3, *shape, scale=0.7))


class LossCase(NamedTuple):
    """One call of a policy loss."""

    mode: str
    loss_agg_mode: str
    weighted: bool = False
    global_batch: dict[str, Any] = {}  # noqa: RUF012

    @property
    def name(self) -> str:
        ranks = self.global_batch.get("dp_size", 1)
        return f"{self.mode}/{self.loss_agg_mode}/{'weighted' if self.weighted else 'plain'}/{ranks}"


_GLOBAL = {"dp_size": 2, "batch_num_tokens": 61, "global_batch_size": 11, "loss_scale_factor": 9}
_ALONE = {"dp_size": 1, "batch_num_tokens": None, "global_batch_size": None, "loss_scale_factor": None}
_FORMS = (
    ("token-mean", False, _ALONE),
    ("token-mean", True, _GLOBAL),
    ("token-sum", False, _GLOBAL),
    ("seq-mean-token-mean", False, _ALONE),
    ("seq-mean-token-sum", True, _GLOBAL),
    ("seq-mean-token-sum-norm", False, _ALONE),
    ("seq-mean-token-sum-norm", True, _GLOBAL),
)
MODES = ("vanilla", "dppo_tv", "dppo_kl", "gspo", "sapo", "gpg", "clip_cov", "kl_cov", "geo_mean", "dro", "cispo")
LOSS_CASES = tuple(LossCase(mode, *form) for mode in MODES for form in _FORMS)

# Every candidate of "clip_cov" is drawn, since verl draws with a generator of its own.
POLICY_LOSS = {
    "clip_cov_ratio": 1.0,
    "clip_cov_lb": 0.1,
    "clip_cov_ub": 2.0,
    "kl_cov_ratio": 0.3,
    "ppo_kl_coef": 0.7,
    "dro_beta": 0.25,
}
ACTOR = {"clip_ratio": 0.2, "clip_ratio_low": 0.25, "clip_ratio_high": 0.3, "tau_pos": 1.1, "tau_neg": 1.3}
CLIP_RATIO_C = 1.8


def actor_options(case: LossCase) -> dict[str, Any]:
    """Options of verl's ActorConfig, as a mapping."""
    return {
        **ACTOR,
        "clip_ratio_c": CLIP_RATIO_C,
        "loss_agg_mode": case.loss_agg_mode,
        "policy_loss": {"loss_mode": case.mode, **POLICY_LOSS},
        "global_batch_info": dict(case.global_batch),
    }


ESTIMATOR_CASES = {
    "grpo": ("grpo", {}),
    "grpo without deviation": ("grpo", {"norm_adv_by_std_in_grpo": False}),
    "grpo_passk": ("grpo_passk", {}),
    "grpo_passk without deviation": ("grpo_passk", {"norm_adv_by_std_in_grpo": False}),
    "rloo": ("rloo", {}),
    "rloo_vectorized": ("rloo_vectorized", {}),
    "opo": ("opo", {}),
    "reinforce_plus_plus_baseline": ("reinforce_plus_plus_baseline", {}),
    "gpg": ("gpg", {}),
    "gdpo": ("gdpo", {"gdpo_reward_keys": ["right", "short"], "gdpo_reward_weights": [1.0, 0.5]}),
}
"""verl's estimator and the options of `algorithm`."""


def token_level_rewards() -> Tensor:
    """[BATCH, TOKENS] float64: a reward at the last token, as verl's reward managers leave it; one of them 0."""
    rewards = torch.zeros(BATCH, TOKENS, dtype=torch.float64)
    values = wave(1.3, BATCH, scale=2.0)
    values[3] = 0.0
    for row, length in enumerate(LENGTHS):
        rewards[row, max(length - 1, 0)] = values[row]
    return rewards


def uids(name: str) -> tuple[str, ...]:
    """Group ids; without the group of one where verl refuses it."""
    return (*UIDS[:-1], "b") if name.startswith("grpo_passk") else UIDS


def reward_components() -> dict[str, list[float]]:
    """Components of the reward, which only "gdpo" reads."""
    return {"right": [1.0, 0.0, 0.0, 1.0, 1.0, 1.0], "short": [0.25, -1.0, 0.5, 2.0, 0.125, 0.0]}
