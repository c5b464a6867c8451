"""Options of a run, with their defaults."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

TASK_NAMES = ("digit_sorting", "spell_backward")
MODELS = ("dense", "moe")
REPLAYS = ("rollout", "old", "off")
RECIPES = ("fp32", "bf16", "fp8_block128", "fp8_block128_wgrad")


@dataclass(frozen=True)
class Settings:
    """What a run depends on. None for a number of steps means the task's own."""

    output: Path = Path("outputs/r1")
    tasks: tuple[str, ...] = TASK_NAMES
    seed: int = 0
    device: str = "cpu"
    threads: int = 2
    resume: bool = False
    save_every: int = 50  # steps; 0 = only at the end of a stage

    width: int = 64
    layers: int = 2
    heads: int = 4
    mtp: int = 0  # layers of multi-token prediction; as many tokens of a sample are drafted at a time
    model: str = "dense"  # or "moe": experts in place of the feed-forward layers
    experts: int = 8  # this and what follows: of the MoE model
    experts_per_token: int = 2
    shared_expert: bool = True
    recipe: str = "fp32"  # of the experts' products; the parameters are float32 whatever it is
    replay: str = "rollout"  # whose routes training takes: those of sampling, of the old log-probs, or none ("off")
    aux_loss_coef: float = 0.01  # of the balance loss, in the cold start
    bias_update_rate: float = 1e-3  # of the biases in the choice of experts, in the cold start; then they stay

    sft_steps: int | None = None
    sft_batch: int = 64
    sft_learning_rate: float = 2e-3

    grpo_steps: int | None = None
    prompts: int = 32  # per step
    group_size: int = 8  # samples per prompt
    updates_per_rollout: int = 2  # optimiser steps on one rollout; from the second on the ratio differs from 1
    grpo_learning_rate: float = 4e-4  # 1e-3 diverges
    clip: float = 0.2  # the ratio counts up to 1 - clip and 1 + clip
    kl_coef: float = 0.01
    temperature: float = 1.0
    max_grad_norm: float = 1.0
    shuffle_rewards: bool = False  # the control: rewards change places inside their group, so they carry no signal

    evaluate_every: int = 25  # steps
    evaluation_prompts: int = 256

    def __post_init__(self) -> None:
        if self.mtp < 0:
            raise ValueError(f"mtp must be at least 0 (no drafts), got {self.mtp}")
        if self.recipe not in RECIPES:
            raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {self.recipe!r}")
        if self.recipe != "fp32" and self.model != "moe":
            raise ValueError(f"recipe {self.recipe!r} is for experts: model must be 'moe', got {self.model!r}")
