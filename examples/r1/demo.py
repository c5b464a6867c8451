"""The demonstration: all stages, then the reports."""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter

from rich.console import Console

from examples.r1.interrupt import interrupted
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
    whole = replace(prepared, settings=replace(settings, expert_parallel=False))  # each rank has a part of the model
    result = PipelineResult(
        settings,
        parameters=count_parameters(whole.build_policy()),
        stages=pipeline.results,
        model=stage.model if stage.trains_policy else None,
        samples=pipeline.progress.samples,
        seconds=perf_counter() - start,
        machine={"processes": prepared.ranks.world},
    )
    if prepared.ranks.is_main:
        report.save(result)  # training is safe, whatever becomes of the measurements
    _measure(result, stage, pipeline)
    result.seconds = perf_counter() - start
    if prepared.ranks.is_main:
        report.publish(result, console)
    return result


def _measure(result: PipelineResult, stage: Stage, pipeline: Pipeline) -> None:
    """The last policy's loss step and drafts; model state, if that was asked for. A run may be stopped in between."""
    run = pipeline.run
    if isinstance(stage, RLStage):
        result.loss_step = loss_step.compare(stage, stage.steps)._asdict()
        if run.settings.compare_vocabulary:
            at = loss_step.compare_at(stage, stage.steps, run.settings.compare_vocabulary)
            result.large_loss_step = at._asdict()
        _stop_if_asked(pipeline)
        if stage.model.mtp is not None:
            result.draft_speed = draft_speed.compare(stage, stage.steps)._asdict()
    _stop_if_asked(pipeline)
    if run.settings.compare_ppo and run.ranks.is_main:
        result.ppo = ppo_memory.compare(run)
    _stop_if_asked(pipeline)


def _stop_if_asked(pipeline: Pipeline) -> None:
    """The checkpoint is that of the trained policy: a run that goes on only measures."""
    if pipeline.must_stop():
        raise interrupted()
