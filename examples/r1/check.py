"""`python -m examples.r1.check`: does training work, for several seeds, and for the right reason?"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter

from rich.console import Console

from examples.r1.demo import run
from examples.r1.pipeline import TaskResult, run_task
from examples.r1.report import summarise
from examples.r1.seeds import Run, Verdicts, add_options, run_all
from examples.r1.settings import MODELS, Settings

SORTING_ACCURACY = 0.9  # greedy, on held-out prompts, at the end
SPELLING_RISE = 0.2  # greedy, on held-out prompts, from the end of the cold start to the end of GRPO
CONTROL_RISE = 0.05  # of the sampled accuracy, at most, with rewards that carry no signal
CONTROL_STEPS = 40


def judge(result: TaskResult, run_name: str, verdicts: Verdicts) -> None:
    """The conditions of a task that was trained with its true rewards."""
    grpo = summarise(result)["stages"]["grpo"]
    before, after = grpo["before"]["accuracy"], grpo["after"]["accuracy"]
    found = f"{before:.3f} -> {after:.3f}"
    if result.task == "digit_sorting":
        verdicts.add(run_name, f"digit_sorting: accuracy >= {SORTING_ACCURACY}", found, after >= SORTING_ACCURACY)
    else:
        verdicts.add(
            run_name, f"{result.task}: accuracy rises by >= {SPELLING_RISE}", found, after - before >= SPELLING_RISE
        )


def judge_control(result: TaskResult, run_name: str, verdicts: Verdicts) -> None:
    """With shuffled rewards the samples must not get better: the advantages alone can have taught them."""
    grpo = summarise(result)["stages"]["grpo"]
    before, after = grpo["before"]["sampled_accuracy"], grpo["after"]["sampled_accuracy"]
    condition = f"{result.task}: sampled accuracy rises by <= {CONTROL_RISE}"
    verdicts.add(run_name, condition, f"{before:.3f} -> {after:.3f}", after - before <= CONTROL_RISE)


def check(settings: Settings, console: Console) -> Verdicts:
    """Every task with its true rewards."""
    verdicts = Verdicts()
    for result in run(settings, console):
        judge(result, f"seed {settings.seed}", verdicts)
    return verdicts


def check_control(settings: Settings, console: Console) -> Verdicts:
    """Digit sorting with shuffled rewards."""
    verdicts = Verdicts()
    judge_control(run_task("digit_sorting", settings, console), "shuffled rewards", verdicts)
    return verdicts


def run_checks(checks: Sequence[tuple[Run[Verdicts], Settings]], jobs: int, console: Console) -> Verdicts:
    """The verdicts of all checks, in order."""
    verdicts = Verdicts()
    for found in run_all(checks, jobs, console):
        verdicts.extend(found)
    return verdicts


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.r1.check", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("outputs/r1-check"), help="(default: %(default)s)")
    parser.add_argument("--model", choices=MODELS, default="dense", help="(default: %(default)s)")
    parser.add_argument("--mtp", type=int, default=0, help="tokens drafted at a time (default: %(default)s)")
    add_options(parser)
    options = parser.parse_args()
    console, start = Console(), perf_counter()
    settings = Settings(device=options.device, model=options.model, mtp=options.mtp)
    checks: list[tuple[Run[Verdicts], Settings]] = [
        (check, replace(settings, seed=seed, output=options.output / f"seed-{seed}")) for seed in options.seeds
    ]
    control = replace(
        settings,
        seed=options.seeds[0],
        shuffle_rewards=True,
        grpo_steps=CONTROL_STEPS,
        output=options.output / "shuffled-rewards",
    )
    verdicts = run_checks([*checks, (check_control, control)], options.jobs, console)
    verdicts.print(console, "examples.r1.check")
    console.print(f"{perf_counter() - start:.0f} s", highlight=False)
    return 1 if verdicts.failed else 0


if __name__ == "__main__":
    sys.exit(main())
