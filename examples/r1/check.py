"""`python -m examples.r1.check`: does training work, for several seeds, and for the right reason?"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
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
        self._rows: list[tuple[str, str, str, bool]] = []

    @property
    def failed(self) -> bool:
        return not all(holds for *_, holds in self._rows)

    def add(self, run_name: str, condition: str, found: str, holds: bool) -> None:
        self._rows.append((run_name, condition, found, holds))

    def extend(self, other: Verdicts) -> None:
        self._rows += other._rows

    def print(self, console: Console) -> None:
        table = Table("run", "what must hold", "found", "", title="examples.r1.check")
        for *words, holds in self._rows:
            table.add_row(*words, "ok" if holds else "FAILED", style="" if holds else "bold red")
        console.print(table)


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


Check = Callable[[Settings, Console], Verdicts]


def _aside(function: Check, settings: Settings) -> tuple[Verdicts, str]:
    """What the function returns, and what it prints."""
    text = io.StringIO()
    return function(settings, Console(file=text, width=120)), text.getvalue()


def run_checks(checks: Sequence[tuple[Check, Settings]], jobs: int, console: Console) -> Verdicts:
    """In order; or `jobs` at a time, each in a process, whose output is shown when it has ended."""
    verdicts = Verdicts()
    if jobs == 1:
        for function, settings in checks:
            verdicts.extend(function(settings, console))
        return verdicts
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(_aside, function, settings) for function, settings in checks]
        for future in futures:
            found, text = future.result()
            console.out(text, highlight=False, end="")
            verdicts.extend(found)
    return verdicts


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.r1.check", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("outputs/r1-check"), help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--model", choices=MODELS, default="dense", help="(default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: %(default)s)")
    options = parser.parse_args()
    console, start = Console(), perf_counter()
    settings = Settings(device=options.device, model=options.model)
    checks: list[tuple[Check, Settings]] = [
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
    verdicts.print(console)
    console.print(f"{perf_counter() - start:.0f} s", highlight=False)
    return 1 if verdicts.failed else 0


if __name__ == "__main__":
    sys.exit(main())
