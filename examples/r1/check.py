"""`python -m examples.r1.check`: does training work, for several seeds, and for the right reason?"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from time import perf_counter

from rich.console import Console
from rich.table import Table

from examples.r1.demo import run
from examples.r1.pipeline import TaskResult, run_task
from examples.r1.report import summarise
from examples.r1.settings import MODELS, Settings

SORTING_ACCURACY = 0.9  # greedy, on held-out prompts, at the end
SPELLING_RISE = 0.2  # greedy, on held-out prompts, from the end of the cold start to the end of GRPO
CONTROL_RISE = 0.05  # of the sampled accuracy, at most, with rewards that carry no signal
CONTROL_STEPS = 40


class Verdicts:
    """What was checked, and whether it held."""

    def __init__(self) -> None:
        self.failed = False
        self._table = Table("run", "what must hold", "found", "", title="examples.r1.check")

    def add(self, run_name: str, condition: str, found: str, holds: bool) -> None:
        self.failed |= not holds
        self._table.add_row(run_name, condition, found, "ok" if holds else "FAILED", style="" if holds else "bold red")

    def print(self, console: Console) -> None:
        console.print(self._table)


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


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.r1.check", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("outputs/r1-check"), help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--model", choices=MODELS, default="dense", help="(default: %(default)s)")
    options = parser.parse_args()
    console, verdicts, start = Console(), Verdicts(), perf_counter()
    settings = Settings(device=options.device, model=options.model)
    for seed in options.seeds:
        for result in run(replace(settings, seed=seed, output=options.output / f"seed-{seed}"), console):
            judge(result, f"seed {seed}", verdicts)
    control = replace(
        settings,
        seed=options.seeds[0],
        shuffle_rewards=True,
        grpo_steps=CONTROL_STEPS,
        output=options.output / "shuffled-rewards",
    )
    judge_control(run_task("digit_sorting", control, console), "shuffled rewards", verdicts)
    verdicts.print(console)
    console.print(f"{perf_counter() - start:.0f} s", highlight=False)
    return 1 if verdicts.failed else 0


if __name__ == "__main__":
    sys.exit(main())
