"""`python -m examples.r1`: the whole demonstration."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields, replace
from pathlib import Path

from rich.console import Console

from examples.r1.checkpoint import CheckpointMismatch
from examples.r1.demo import run
from examples.r1.settings import MODELS, RECIPES, REPLAYS, TASK_NAMES, Settings


def parse_arguments(arguments: list[str] | None = None) -> Settings:
    default = Settings()
    parser = argparse.ArgumentParser(prog="python -m examples.r1", description=__doc__)
    add = parser.add_argument
    add("--tasks", nargs="+", choices=TASK_NAMES, default=default.tasks, help="what to train on (default: both)")
    add("--seed", type=int, default=default.seed)
    add("--device", default=default.device, help="cpu or cuda (default: %(default)s)")
    add("--threads", type=int, default=default.threads, help="of PyTorch, on a CPU (default: %(default)s)")
    add("--output", type=Path, default=default.output, help="folder for results (default: %(default)s)")
    add("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    add("--save-every", type=int, default=default.save_every, help="steps between checkpoints; 0: one a stage")
    add("--steps", dest="grpo_steps", type=int, help="GRPO steps a task (default: the task's own)")
    add("--sft-steps", type=int, help="steps of the cold start (default: the task's own)")
    add("--prompts", type=int, default=default.prompts, help="a GRPO step (default: %(default)s)")
    add("--group-size", type=int, default=default.group_size, help="samples a prompt (default: %(default)s)")
    add("--updates-per-rollout", type=int, default=default.updates_per_rollout, help="(default: %(default)s)")
    add("--learning-rate", dest="grpo_learning_rate", type=float, default=default.grpo_learning_rate, help="of GRPO")
    add("--clip", type=float, default=default.clip, help="of the ratio (default: %(default)s)")
    add("--kl-coef", type=float, default=default.kl_coef, help="weight of the KL penalty (default: %(default)s)")
    add("--temperature", type=float, default=default.temperature, help="of the samples (default: %(default)s)")
    add("--width", type=int, default=default.width, help="of the model (default: %(default)s)")
    add("--layers", type=int, default=default.layers, help="of the model (default: %(default)s)")
    add("--heads", type=int, default=default.heads, help="of the model (default: %(default)s)")
    add("--mtp", type=int, default=default.mtp, help="tokens drafted at a time; 0: no drafts (default: %(default)s)")
    add("--model", choices=MODELS, default=default.model, help="(default: %(default)s)")
    add("--experts", type=int, default=default.experts, help="of a layer of the MoE model (default: %(default)s)")
    add("--experts-per-token", type=int, default=default.experts_per_token, help="(default: %(default)s)")
    add("--no-shared-expert", dest="shared_expert", action="store_false", help="the MoE model has none")
    add("--recipe", choices=RECIPES, default=default.recipe, help="of its experts' products (default: %(default)s)")
    add("--replay", choices=REPLAYS, default=default.replay, help="whose routes training takes (default: %(default)s)")
    add("--aux-loss-coef", type=float, default=default.aux_loss_coef, help="in the cold start (default: %(default)s)")
    add("--bias-update-rate", type=float, default=default.bias_update_rate, help="likewise (default: %(default)s)")
    add("--evaluate-every", type=int, default=default.evaluate_every, help="steps (default: %(default)s)")
    add("--shuffle-rewards", action="store_true", help="control: rewards change places in their group")
    values = vars(parser.parse_args(arguments))
    values["tasks"] = tuple(values["tasks"])
    known = {field.name for field in fields(Settings)}
    try:
        return replace(default, **{name: value for name, value in values.items() if name in known})
    except ValueError as error:
        parser.error(str(error))


def main() -> int:
    console = Console()
    try:
        run(parse_arguments(), console)
    except (CheckpointMismatch, ModuleNotFoundError) as error:
        console.print(f"examples.r1: {error}", style="red", highlight=False)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
