"""Options of the command line: one for each field of the settings."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

from examples.r1 import choices, settings_checks
from examples.r1.quick import QUICK
from examples.r1.saving.run_state import saved_settings
from examples.r1.settings import Settings

_CHOICES = {
    "stages": tuple(choices.STAGES),
    "model": choices.MODELS,
    "recipe": choices.RECIPES,
    "replay": choices.REPLAYS,
    "preset": choices.PRESETS,
    "aggregation": choices.AGGREGATIONS,
}

_HELP = {
    "the run": {
        "output": "folder for results",
        "stages": "which to run, in this order",
        "start_from": "folder of another run, whose models take the place of stages that are left out",
        "seed": "of everything random",
        "device": "cpu or cuda",
        "threads": "of PyTorch, on a CPU",
        "resume": "go on from the last checkpoint in the output folder, with its options; without one, begin anew",
        "save_every": "steps between checkpoints; 0: only where a stage begins and ends",
        "evaluate_every": "steps between looks at held-out problems",
        "evaluation_prompts": "held-out problems of each task",
        "report": "write a page of HTML with all results to this file",
        "compare_vocabulary": "tokens of a head that the loss step is measured with, beside the example's own; 0: none",
        "compare_ppo": "allocate what PPO would hold beside the policy, and compare",
    },
    "the model": {
        "model": "dense, or with experts in place of the feed-forward layers",
        "width": "of the hidden states",
        "layers": "blocks of attention and feed-forward layers",
        "heads": "of the attention",
        "mtp": "layers of multi-token prediction, which draft as many tokens at a time; 0: none",
        "experts": "of a layer of the MoE model",
        "experts_per_token": "that each token is routed to",
        "shared_expert": "the MoE model has no expert that every token goes through",
        "expert_parallel": "each process holds a part of the experts",
        "recipe": "of the experts' products",
        "replay": "whose routes training takes: those of sampling, of the old log-probs, or none",
        "balance_coef": "of the balance loss, where demonstrations are imitated",
        "bias_update_rate": "of the biases in the choice of experts, likewise",
    },
    "imitation": {
        "sft_batch": "demonstrations a step",
        "sft_learning_rate": "of the cold start, the reward model, and the SFT on what rejection sampling kept",
        "cold_start_steps": "SFT on demonstrations",
        "reward_model_steps": "SFT of the reward model",
        "rejection_prompts": "of each task that are sampled",
        "rejection_group_size": "samples of each of them",
        "judge_threshold": "score of the reward model that a sample needs to be kept",
        "rejection_sampling_steps": "SFT on what was kept",
    },
    "reinforcement": {
        "reasoning_rl_steps": "with rewards by rules",
        "diverse_rl_steps": "with those and the reward model's",
        "prompts": "of a step",
        "group_size": "samples of a prompt",
        "updates_per_rollout": "optimiser steps on the samples of a step",
        "dynamic_sampling": "most rounds of sampling a step of reasoning RL, for groups whose rewards differ; 1: off",
        "diverse_dynamic_sampling": "the same of diverse RL",
        "reasoning_learning_rate": "of reasoning RL",
        "diverse_learning_rate": "of diverse RL",
        "reasoning_temperature": "of its samples",
        "diverse_temperature": "of its samples",
        "preset": "the loss",
        "clip": "the ratio counts from 1 - clip to 1 + clip; else as the preset has it",
        "kl_coef": "weight of the KL penalty",
        "aggregation": "of the rewards: each normalised by itself (GDPO), or their sum",
        "max_grad_norm": "gradients are clipped to this",
        "shuffle_rewards": "control: rewards change places in their group, so that they carry no signal",
        "weak_judge": "control: a reward model that has learnt next to nothing",
    },
}


def parser() -> argparse.ArgumentParser:
    """An option `--group-size` for the field `group_size`, and so on."""
    made = argparse.ArgumentParser(
        prog="python -m examples.r1",
        usage="%(prog)s [options]",
        description="Takes a small model through all stages of R1.",
        allow_abbrev=False,
    )
    made.add_argument("--quick", action="store_true", help="fewer and smaller steps, for a look in less than a minute")
    hints, defaults = get_type_hints(Settings), {item.name: item.default for item in fields(Settings)}
    for title, texts in _HELP.items():
        group = made.add_argument_group(title)
        for name, text in texts.items():
            _add(group, name, hints[name], defaults[name], text)
    return made


def _add(group: Any, name: str, kind: Any, default: Any, text: str) -> None:
    option = f"--{name.replace('_', '-')}"
    if kind is bool:
        flag = f"--no-{name.replace('_', '-')}" if default else option
        group.add_argument(flag, dest=name, action="store_false" if default else "store_true", help=text)
        return
    if name == "stages":
        group.add_argument(option, nargs="+", choices=_CHOICES[name], default=default, help=text, metavar="STAGE")
        return
    shown = text if default is None else f"{text} (default: %(default)s)"
    plain = get_args(kind)[0] if isinstance(kind, UnionType) else kind
    choices = _CHOICES.get(name)
    word = None if choices else {Path: "PATH", str: "NAME"}.get(plain, "N")
    group.add_argument(option, type=plain, choices=choices, default=default, help=shown, metavar=word)


def parse_arguments(arguments: Sequence[str] | None = None) -> Settings:
    """The settings; what is wrong with them goes to standard error, and the program ends with code 2.

    What is not given has its default; with `--resume`, what the checkpoint was made with.
    """
    made = parser()
    first = made.parse_args(arguments)
    try:
        if first.resume:
            made.set_defaults(**saved_settings(first.output / "checkpoint"))
        if first.quick:
            made.set_defaults(**QUICK)
        values = vars(made.parse_args(arguments))
        del values["quick"]
        values["stages"] = tuple(values["stages"])
        settings = replace(Settings(), **values)
        settings_checks.check_surroundings(settings)
    except ValueError as error:
        made.error(str(error))
    return settings
