"""The demonstration: all stages, then the reports."""

from __future__ import annotations

from time import perf_counter

from rich.console import Console

from examples.r1 import draft_speed, loss_step, ppo_memory, report
from examples.r1.grpo import RLStage
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
    policy = stage if isinstance(stage, RLStage) else None  # what the measurements need
    drafts = policy is not None and policy.model.mtp is not None
    result = PipelineResult(
        settings,
        parameters=count_parameters(stage.model),
        stages=pipeline.results,
        model=stage.model,
        loss_step=loss_step.compare(policy, policy.steps) if policy else None,
        draft_speed=draft_speed.compare(policy, policy.steps) if policy and drafts else None,
        ppo=ppo_memory.compare(prepared) if settings.compare_ppo and prepared.ranks.is_main else None,
        samples=pipeline.progress.samples,
        seconds=perf_counter() - start,
        machine={"processes": prepared.ranks.world},
    )
    if prepared.ranks.is_main:
        report.publish(result, console)
    return result
