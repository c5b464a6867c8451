"""The demonstration: all stages, then the reports."""

from __future__ import annotations

from time import perf_counter

from rich.console import Console

from examples.r1.measuring import draft_speed, loss_step, ppo_memory
from examples.r1.parallel import Ranks
from examples.r1.pipeline import Pipeline
from examples.r1.policy.model import count_parameters
from examples.r1.reporting import report
from examples.r1.results import PipelineResult
from examples.r1.run import Run
from examples.r1.settings import Settings
from examples.r1.stages.grpo import RLStage
from examples.r1.stages.stage import Stage


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
        report.save(result)  # training is safe, whatever becomes of the measurements
    _measure(result, stage, prepared)
    result.seconds = perf_counter() - start
    if prepared.ranks.is_main:
        report.publish(result, console)
    return result


def _measure(result: PipelineResult, stage: Stage, run: Run) -> None:
    """The last policy's loss step and drafts; model state, if that was asked for."""
    if isinstance(stage, RLStage):
        result.loss_step = loss_step.compare(stage, stage.steps)._asdict()
        if run.settings.compare_vocabulary:
            at = loss_step.compare_at(stage, stage.steps, run.settings.compare_vocabulary)
            result.large_loss_step = at._asdict()
        if stage.model.mtp is not None:
            result.draft_speed = draft_speed.compare(stage, stage.steps)._asdict()
    if run.settings.compare_ppo and run.ranks.is_main:
        result.ppo = ppo_memory.compare(run).as_json()
