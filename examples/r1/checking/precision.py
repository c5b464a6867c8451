"""`python -m examples.r1.checking.precision`: what FP8 experts cost, in validation loss of the cold start."""

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
from examples.r1.checking.jobs import Job, Verdicts, add_options, run_all
from examples.r1.choices import RECIPES
from examples.r1.reporting.progress_bar import progress_bar
from examples.r1.run import Run
from examples.r1.saving.run_state import comparable_settings
from examples.r1.saving.storage import save_json
from examples.r1.settings import Settings
from examples.r1.stages.sft import ColdStart

BASELINE = "bf16"
TOLERANCE = 0.01  # of the baseline's mean over the seeds, in either direction


class Comparison(NamedTuple):
    """The losses at the end with one recipe beside those of the baseline, in the order of the seeds."""

    recipe: str
    losses: list[float]
    baseline: list[float]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return sum(self.losses) / len(self.losses)

    @property
    def ratio(self) -> float:
        """That mean over the baseline's."""
        return sum(self.losses) / sum(self.baseline)

    @property
    def seed_ratios(self) -> list[float]:
        """Of each seed by itself."""
        return [mine / theirs for mine, theirs in zip(self.losses, self.baseline, strict=True)]

    @property
    def holds(self) -> bool:
        return abs(self.ratio - 1.0) <= TOLERANCE


def cold_start(settings: Settings, console: Console) -> float:
    """Trains the first stage, without samples and checkpoints; returns its validation loss."""
    run = Run.prepare(settings)
    stage = ColdStart(run.build_policy(), run)
    with progress_bar(console, f"{settings.recipe}, seed {settings.seed}", stage.steps) as report:
        for index in range(stage.steps):
            report(index + 1, stage.step(index))
    return stage.validation_loss()


def compare(
    settings: Settings, recipes: Sequence[str], seeds: Sequence[int], at_once: int, console: Console
) -> list[Comparison]:
    """Trains the cold start with every recipe and seed; the baseline is among the recipes."""
    jobs = [
        Job(f"{recipe} {seed}", cold_start, replace(settings, recipe=recipe, seed=seed))
        for recipe, seed in product(recipes, seeds)
    ]
    found = run_all(jobs, at_once, console)
    losses = {recipe: [found[f"{recipe} {seed}"] for seed in seeds] for recipe in recipes}
    return [Comparison(recipe, losses[recipe], losses[BASELINE]) for recipe in recipes]


def table(comparisons: Sequence[Comparison], seeds: Sequence[int]) -> Table:
    """One row a recipe."""
    table = Table(title="Validation loss at the end of the cold start, nats a token", caption=f"ratios to {BASELINE}")
    table.add_column("recipe", no_wrap=True)
    for name in (*(f"seed {seed}" for seed in seeds), "mean", "ratio", "of single seeds"):
        table.add_column(name, justify="right")
    for row in comparisons:
        ratios = row.seed_ratios
        cells = [f"{loss:.4f}" for loss in row.losses]
        cells += [f"{row.mean:.4f}", f"{row.ratio:.4f}", f"{min(ratios):.3f} - {max(ratios):.3f}"]
        table.add_row(row.recipe, *cells)
    return table


def judge(comparisons: Sequence[Comparison]) -> Verdicts:
    """Every recipe but the baseline stays within the tolerance."""
    verdicts = Verdicts()
    for row in comparisons:
        if row.recipe != BASELINE:
            condition = f"mean loss within {TOLERANCE:.0%} of {BASELINE}"
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
        "results": [
            {
                "recipe": row.recipe,
                "losses": row.losses,
                "mean": row.mean,
                f"mean_over_{BASELINE}": row.ratio,
                f"seeds_over_{BASELINE}": row.seed_ratios,
                "holds": row.holds,
            }
            for row in comparisons
        ],
    }


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    default = Settings()
    parser = argparse.ArgumentParser(prog="python -m examples.r1.checking.precision", description=__doc__)
    add_options(parser)
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
    settings = Settings(model="moe", device=options.device, threads=options.threads)
    comparisons = compare(settings, options.recipes, options.seeds, options.jobs, console)
    console.print(table(comparisons, options.seeds))
    verdicts = judge(comparisons)
    verdicts.print(console, "examples.r1.checking.precision")
    if options.save is not None:
        save_json(options.save, as_json(comparisons, settings, options.seeds))
    console.print(f"{perf_counter() - start:.0f} s", highlight=False)
    return 1 if verdicts.failed else 0


if __name__ == "__main__":
    sys.exit(main())
