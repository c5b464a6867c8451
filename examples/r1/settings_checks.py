"""What settings must hold for a run to make sense and to find what it needs: told before anything is trained."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from examples.r1 import choices
from examples.r1.errors import RunError
from examples.r1.saving.storage import check_writable
from grpo_kernels import GRPOLossConfig

if TYPE_CHECKING:
    from examples.r1.parallel import Ranks
    from examples.r1.settings import Settings

MOST_EVALUATION_PROMPTS = 1000  # of a task; so many no run trains on, whatever it evaluates and starts from
_AT_LEAST = {
    "threads": 1,
    "save_every": 0,
    "width": 1,
    "layers": 1,
    "heads": 1,
    "mtp": 0,
    "experts": 1,
    "experts_per_token": 1,
    "sft_batch": 1,
    "cold_start_steps": 0,
    "reward_model_steps": 0,
    "rejection_sampling_steps": 0,
    "reasoning_rl_steps": 0,
    "diverse_rl_steps": 0,
    "prompts": 1,
    "group_size": 2,  # one sample has nothing to be compared with
    "updates_per_rollout": 1,
    "compare_vocabulary": 0,
    "dynamic_sampling": 1,
    "diverse_dynamic_sampling": 1,
    "rejection_prompts": 1,
    "rejection_group_size": 1,
    "evaluate_every": 1,
    "evaluation_prompts": 1,
    "balance_coef": 0,
    "bias_update_rate": 0,
    "kl_coef": 0,
    "reasoning_temperature": 0.01,  # below, log-probs are too large for float32's exponentials to say anything
    "diverse_temperature": 0.01,
}
_AT_MOST = {
    "mtp": 8,
    "evaluation_prompts": MOST_EVALUATION_PROMPTS,
}
_POSITIVE = (
    "sft_learning_rate",
    "reasoning_learning_rate",
    "diverse_learning_rate",
    "max_grad_norm",
)
_SHARES = ("judge_threshold",)


def check(settings: Settings) -> None:
    """Raises RunError that names the first setting that is out of range or does not go with the others."""
    for name, least in _AT_LEAST.items():
        value = getattr(settings, name)
        _demand(math.isfinite(value) and value >= least, name, f"at least {least}", value)
    for name, most in _AT_MOST.items():
        value = getattr(settings, name)
        _demand(value <= most, name, f"at most {most}", value)
    for name in _POSITIVE:
        value = getattr(settings, name)
        _demand(math.isfinite(value) and value > 0.0, name, "positive and finite", value)
    for name in _SHARES:
        value = getattr(settings, name)
        _demand(0.0 <= value <= 1.0, name, "between 0 and 1", value)
    for name in ("model", "recipe", "replay", "aggregation", "preset"):
        value, known = getattr(settings, name), getattr(choices, f"{name.upper()}S")
        _demand(value in known, name, f"one of {', '.join(known)}", repr(value))
    _check_stages(settings)
    _check_model(settings)
    changes = {} if settings.clip is None else {"clip_low": settings.clip, "clip_high": settings.clip}
    GRPOLossConfig.preset(settings.preset, kl_coef=settings.kl_coef, **changes)  # says itself what does not go with it


def check_surroundings(settings: Settings) -> None:
    """Raises ValueError if something is not there: the device, a folder, models of stages that are left out.

    A folder that cannot be written to raises CheckpointError, which is one.
    """
    _check_device(settings.device)
    _demand(not settings.output.is_file(), "output", "a folder", f"the file {settings.output}")
    if settings.report is not None:
        _demand(not settings.report.is_dir(), "report", "a file", f"the folder {settings.report}")
        check_writable(settings.report.parent)
    missing = [(stage, needed) for stage in settings.stages for needed in choices.STAGES[stage].starts_from]
    missing = [(stage, needed) for stage, needed in missing if needed not in settings.stages]
    for stage, needed in missing:
        _check_start(settings, stage, needed)
    if settings.start_from is not None and not missing:
        raise ValueError(f"start_from has nothing to give: {', '.join(settings.stages)} start from no other stage")


def check_shares(settings: Settings, ranks: Ranks) -> None:
    """Raises RunError that names the first setting of which the ranks cannot have equal shares."""
    if ranks.process_group is None:
        if settings.expert_parallel:
            raise RunError(
                "expert_parallel shares out experts among processes, and there is one: "
                "torchrun --nproc-per-node 2 -m examples.r1 starts two"
            )
        return
    for name in ("sft_batch", "group_size", "rejection_group_size", "evaluation_prompts"):
        ranks.share(name, getattr(settings, name))
    if settings.expert_parallel:
        ranks.share("experts", settings.experts)
    if GRPOLossConfig.preset(settings.preset).selects_tokens:
        raise RunError(
            f"preset {settings.preset!r} chooses among the tokens of a whole batch, which several processes do not see"
        )


def _check_start(settings: Settings, stage: str, needed: str) -> None:
    """Whether another run has the model that a stage starts from."""
    if settings.start_from is None:
        raise ValueError(
            f"{stage} starts from {needed}: run that too, or name the folder of a run that did as start_from"
        )
    path = settings.start_from / "models" / f"{needed}.safetensors"
    _demand(path.is_file(), "start_from", f"the folder of a run with the model of {needed}", f"no file {path}")


def _check_stages(settings: Settings) -> None:
    stages, known = settings.stages, tuple(choices.STAGES)
    wanted = f"some of {', '.join(known)}, each once and in this order"
    in_order = stages == tuple(name for name in known if name in stages)
    _demand(len(stages) > 0 and in_order, "stages", wanted, ", ".join(stages) or "none")
    if settings.weak_judge and "reward_model" not in stages:
        raise ValueError("weak_judge trains a reward model for a few steps: stages must have reward_model among them")


def _check_model(settings: Settings) -> None:
    heads, width = settings.heads, settings.width
    _demand(width % heads == 0, "width", f"a multiple of heads, which is {heads}", width)
    if settings.model == "moe":
        most, active = settings.experts, settings.experts_per_token
        _demand(active <= most, "experts_per_token", f"at most experts, which is {most}", active)
        return
    dense = f"model must be 'moe', got {settings.model!r}"
    if settings.recipe != "fp32":
        raise ValueError(f"recipe {settings.recipe!r} is for experts: {dense}")
    if settings.expert_parallel:
        raise ValueError(f"expert_parallel shares out experts: {dense}")


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be cpu or cuda, got {name!r}") from None
    if device.type == "cuda":
        found = torch.cuda.device_count()
        _demand(found > (device.index or 0), "device", f"one of the {found} GPUs that PyTorch finds, or cpu", name)
    else:
        _demand(device.type == "cpu", "device", "cpu or cuda", repr(name))


def _demand(holds: bool, name: str, wanted: str, value: object) -> None:
    if not holds:
        raise ValueError(f"{name} must be {wanted}, got {value}")
