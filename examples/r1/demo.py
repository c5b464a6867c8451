"""The demonstration: all stages, then the reports."""

from __future__ import annotations

from time import perf_counter

from rich.console import Console

from examples.r1 import report
from examples.r1.model import count_parameters
from examples.r1.parallel import Ranks
from examples.r1.pipeline import Pipeline
from examples.r1.results import PipelineResult
from examples.r1.run import Run
from examples.r1.settings import Settings


def run(settings: Settings, console: Console, ranks: Ranks | None = None) -> PipelineResult:
    """Trains the stages of the settings; the first rank writes the reports and prints the tables."""
    start = perf_counter()
    prepared = Run.prepare(settings, ranks)
    pipeline = Pipeline(prepared, console)
    stage = pipeline.train()
    result = PipelineResult(
        settings,
        parameters=count_parameters(stage.model),
        stages=pipeline.results,
        model=stage.model,
        samples=pipeline.progress.samples,
        seconds=perf_counter() - start,
        machine={"processes": prepared.ranks.world},
    )
    if prepared.ranks.is_main:
        report.publish(result, console)
    return result
