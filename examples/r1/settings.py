"""Options of a run, with their defaults."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from examples.r1 import settings_checks
from examples.r1.choices import STAGES


@dataclass(frozen=True)
class Settings:
    """What a run depends on."""

    output: Path = Path("outputs/r1")
    stages: tuple[str, ...] = tuple(STAGES)
    start_from: Path | None = None  # another run's folder, whose models take the place of stages that are left out
    seed: int = 0
    device: str = "cpu"
    threads: int = 1
    resume: bool = False
    save_every: int = 25  # steps; 0 = only where a stage begins and ends
    report: Path | None = None
    compare_ppo: bool = False
    compare_vocabulary: int = 0  # of a head that the loss step is measured with, too; 0: the example's own alone

    width: int = 64
    layers: int = 2
    heads: int = 4
    mtp: int = 0  # layers of multi-token prediction; as many tokens of a sample are drafted at a time
    model: str = "dense"  # or "moe": experts in place of the feed-forward layers
    experts: int = 8  # this and what follows: of the MoE model
    experts_per_token: int = 2
    shared_expert: bool = True
    expert_parallel: bool = False  # each process holds a part of them
    recipe: str = "fp32"  # of the experts' products; the parameters are float32 whatever it is
    replay: str = "rollout"  # whose routes training takes: those of sampling, of the old log-probs, or none ("off")
    balance_coef: float = 0.01  # of the balance loss, where demonstrations are imitated
    bias_update_rate: float = 1e-3  # of the biases in the choice of experts, likewise; in RL they stay

    sft_batch: int = 64
    sft_learning_rate: float = 2e-3
    cold_start_steps: int = 140
    reward_model_steps: int = 100
    rejection_sampling_steps: int = 240

    reasoning_rl_steps: int = 90
    diverse_rl_steps: int = 80
    prompts: int = 32  # of an RL step
    group_size: int = 8  # samples per prompt
    updates_per_rollout: int = 2  # optimiser steps on one rollout; from the second on the ratio differs from 1
    reasoning_learning_rate: float = 4e-4  # 1e-3 diverges
    diverse_learning_rate: float = 1e-4
    reasoning_temperature: float = 1.0
    diverse_temperature: float = 0.7
    preset: str = "grpo"  # of GRPOLossConfig
    clip: float | None = None  # the ratio counts up to 1 - clip and 1 + clip; None: as the preset has it
    kl_coef: float = 0.01
    aggregation: str = "normalize_then_sum"  # of the rewards: GDPO's, or the sum's own normalisation
    dynamic_sampling: int = 2  # most rounds of sampling a step of reasoning RL, for groups that can teach something
    diverse_dynamic_sampling: int = 1  # of diverse RL, where few groups can, and a second round finds hardly more
    max_grad_norm: float = 1.0

    rejection_prompts: int = 1000  # of each task
    rejection_group_size: int = 8
    judge_threshold: float = 0.5  # score that a general sample needs to be kept

    shuffle_rewards: bool = False  # control: rewards change places inside their group, so they carry no signal
    weak_judge: bool = False  # control: a reward model that has learnt next to nothing

    evaluate_every: int = 25  # steps
    evaluation_prompts: int = 256  # of each task

    def __post_init__(self) -> None:
        settings_checks.check(self)
