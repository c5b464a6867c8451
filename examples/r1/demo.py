"""The demonstration: train on every task, then report."""

from __future__ import annotations

from time import perf_counter

from rich.console import Console

from examples.r1 import report
from examples.r1.pipeline import TaskResult, run_task
from examples.r1.settings import Settings


def run(settings: Settings, console: Console) -> list[TaskResult]:
    """Trains on every task of the settings, writes `results.json` and `curves.png`, and prints the table."""
    start = perf_counter()
    results = [run_task(name, settings, console) for name in settings.tasks]
    seconds = perf_counter() - start
    report.save_json(settings.output / "results.json", report.as_json(results, settings, seconds))
    report.save_curves(settings.output / "curves.png", results)
    console.print(report.table(results))
    console.print(f"{seconds:.0f} s; curves, figures and checkpoints are in {settings.output}", highlight=False)
    return results
