"""`python -m examples.r1.precision`: what FP8 experts cost, in validation loss of the cold start."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from bench.machine import describe
from examples.r1.checkpoint import comparable_settings
from examples.r1.pipeline import prepare
from examples.r1.progress_bar import progress_bar
from examples.r1.report import save_json
from examples.r1.seeds import Run, Verdicts, add_options, run_all
from examples.r1.settings import RECIPES, TASK_NAMES, Settings
from examples.r1.sft import SFTStage

BASELINE = "bf16"
TOLERANCE = 0.01  # of the baseline's mean over the seeds, in either direction
FINAL_STEPS = 0.25  # of the stage's steps, over which the final loss is a mean: a single step moves it by 2 %


class Losses(NamedTuple):
    """What one run ends with."""

    late: list[float]  # after each of the last steps

    @property
    def final(self) -> float:
        return _mean(self.late)


class Comparison(NamedTuple):
    """The runs of one task and recipe beside those of the baseline, in the order of the seeds."""

    task: str
    recipe: str
    losses: list[Losses]
    baseline: list[Losses]

    @property
    def mean(self) -> float:
        """Of the final losses over the seeds."""
        return _mean([found.final for found in self.losses])

    @property
    def ratio(self) -> float:
        """That mean over the baseline's."""
        return self.mean / _mean([found.final for found in self.baseline])

    @property
    def step_ratios(self) -> list[float]:
        """What the ratio would be if the loss after one of the last steps alone were the final one."""
        own, other = (zip(*(found.late for found in losses), strict=True) for losses in (self.losses, self.baseline))
        return [sum(mine) / sum(theirs) for mine, theirs in zip(own, other, strict=True)]

    @property
    def holds(self) -> bool:
        return abs(self.ratio - 1.0) <= TOLERANCE


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def cold_start(settings: Settings, console: Console) -> Losses:
    """Trains the first stage of the settings' one task, without samples and checkpoints."""
    (name,) = settings.tasks
    task, held_out, model = prepare(name, settings)
    stage = SFTStage(model, task, held_out, settings)
    late = stage.steps - max(1, round(stage.steps * FINAL_STEPS))
    losses = []
    with progress_bar(console, f"{name}, {settings.recipe}, seed {settings.seed}", stage.steps) as report:
        for index in range(stage.steps):
            record = stage.step(index)
            if index >= late:
                losses.append(stage.validate()["validation_loss"])
            report(index + 1, f"loss {record['loss']:.3f}")
    return Losses(losses)


def compare(
    settings: Settings, recipes: Sequence[str], seeds: Sequence[int], jobs: int, console: Console
) -> list[Comparison]:
    """Trains the cold start of every task with every recipe and seed; the baseline is among the recipes."""
    cases = list(product(settings.tasks, recipes, seeds))
    runs: list[tuple[Run[Losses], Settings]] = [
        (cold_start, replace(settings, tasks=(task,), recipe=recipe, seed=seed)) for task, recipe, seed in cases
    ]
    losses = dict(zip(cases, run_all(runs, jobs, console), strict=True))

    def row(task: str, recipe: str) -> list[Losses]:
        return [losses[task, recipe, seed] for seed in seeds]

    return [
        Comparison(task, recipe, row(task, recipe), row(task, BASELINE))
        for task, recipe in product(settings.tasks, recipes)
    ]


def table(comparisons: Sequence[Comparison], seeds: Sequence[int]) -> Table:
    """One row a task and recipe."""
    table = Table(
        title="Validation loss at the end of the cold start, nats a token",
        caption=f"means of the last {FINAL_STEPS:.0%} of the steps; ratios to {BASELINE}, and those of single steps",
    )
    for name in ("task", "recipe"):
        table.add_column(name, no_wrap=True)
    for name in (*(f"seed {seed}" for seed in seeds), "mean", "ratio", "single steps", "last"):
        table.add_column(name, justify="right")
    for row in comparisons:
        ratios = row.step_ratios
        cells = [f"{found.final:.4f}" for found in row.losses]
        cells += [f"{row.mean:.4f}", f"{row.ratio:.4f}", f"{min(ratios):.3f} - {max(ratios):.3f}", f"{ratios[-1]:.3f}"]
        table.add_row(row.task, row.recipe, *cells)
    return table


def judge(comparisons: Sequence[Comparison]) -> Verdicts:
    """Every recipe but the baseline stays within the tolerance."""
    verdicts = Verdicts()
    for row in comparisons:
        if row.recipe != BASELINE:
            condition = f"{row.task}: mean within {TOLERANCE:.0%} of {BASELINE}"
            verdicts.add(row.recipe, condition, f"{row.ratio - 1.0:+.3%}", row.holds)
    return verdicts


def as_json(comparisons: Sequence[Comparison], settings: Settings, seeds: Sequence[int]) -> dict[str, Any]:
    """What was trained, where, and what came of it."""
    varied = {"seed", "recipe"}
    return {
        "machine": {**describe(settings.device), "threads": settings.threads},
        "settings": {name: value for name, value in comparable_settings(settings).items() if name not in varied},
        "seeds": list(seeds),
        "tolerance": TOLERANCE,
        "final_steps": FINAL_STEPS,
        "results": [
            {
                "task": row.task,
                "recipe": row.recipe,
                "losses": [found.late for found in row.losses],
                "mean": row.mean,
                f"mean_over_{BASELINE}": row.ratio,
                f"steps_over_{BASELINE}": row.step_ratios,
                "holds": row.holds,
            }
            for row in comparisons
        ],
    }


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    default = Settings()
    parser = argparse.ArgumentParser(prog="python -m examples.r1.precision", description=__doc__)
    add_options(parser)
    parser.add_argument("--tasks", nargs="+", choices=TASK_NAMES, default=TASK_NAMES, help="(default: both)")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=[BASELINE, "fp8_block128"])
    parser.add_argument("--threads", type=int, default=default.threads, help="of a run (default: %(default)s)")
    parser.add_argument("--save", type=Path, metavar="FILE", help="the losses, the machine and the versions, as JSON")
    options = parser.parse_args(arguments)
    if BASELINE not in options.recipes:
        parser.error(f"--recipes needs {BASELINE}, which the others are compared with")
    return options


def main() -> int:
    options = parse_arguments()
    console, start = Console(), perf_counter()
    settings = Settings(model="moe", tasks=tuple(options.tasks), device=options.device, threads=options.threads)
    comparisons = compare(settings, options.recipes, options.seeds, options.jobs, console)
    console.print(table(comparisons, options.seeds))
    verdicts = judge(comparisons)
    verdicts.print(console, "examples.r1.precision")
    if options.save is not None:
        save_json(options.save, as_json(comparisons, settings, options.seeds))
    console.print(f"{perf_counter() - start:.0f} s", highlight=False)
    return 1 if verdicts.failed else 0


if __name__ == "__main__":
    sys.exit(main())
