"""What there is to choose from, by name: the stages of the recipe, models, recipes of experts, losses."""

from __future__ import annotations

from typing import NamedTuple


class StageInfo(NamedTuple):
    """What is known of a stage without importing what trains it."""

    title: str  # with its number in the recipe
    short_title: str
    starts_from: tuple[str, ...] = ()  # stages whose models it takes


STAGES: dict[str, StageInfo] = {
    "cold_start": StageInfo("1  cold start: SFT on noisy demonstrations", "cold start"),
    "reasoning_rl": StageInfo("2  reasoning RL: rule rewards", "reasoning RL", ("cold_start",)),
    "reward_model": StageInfo("   the reward model of stages 3 and 4", "reward model"),
    "rejection_sampling": StageInfo(
        "3  rejection sampling, SFT from the base", "rejection sampling", ("reasoning_rl", "reward_model")
    ),
    "diverse_rl": StageInfo(
        "4  diverse RL: rule and model rewards", "diverse RL", ("rejection_sampling", "reward_model")
    ),
}
"""In the order of the recipe."""

REASONING, GENERAL = "digit_sorting", "spell_backward"


class TaskInfo(NamedTuple):
    """What is known of a task without its problems."""

    title: str
    short_title: str
    word: str  # where there is room for one
    aim: float  # greedy accuracy on held-out prompts at the end of a run


TASKS: dict[str, TaskInfo] = {
    REASONING: TaskInfo("digit sorting", "sorting", "sort", 0.95),
    GENERAL: TaskInfo("spelling backward", "spelling", "spell", 0.95),
}

MODELS = ("dense", "moe")
REPLAYS = ("rollout", "old", "off")
RECIPES = ("fp32", "bf16", "fp8_block128", "fp8_block128_wgrad")
AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")
PRESETS = (
    "grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo", "gspo", "gspo_token", "gmpo", "gpg",
    "dppo_tv", "dppo_kl", "dro", "clip_cov", "kl_cov", "reinforce",
)  # fmt: skip
