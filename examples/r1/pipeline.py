"""Takes a model through the stages, with evaluations and checkpoints on the way."""

from __future__ import annotations

from time import perf_counter

from rich.console import Console

from examples.r1 import choices
from examples.r1.interrupt import interrupted, stop_requested
from examples.r1.reporting.progress_bar import progress_bar
from examples.r1.results import StageResult
from examples.r1.run import Run
from examples.r1.samples import answers
from examples.r1.saving.checkpoint import CheckpointFolder, Progress
from examples.r1.saving.model_folder import ModelFolder
from examples.r1.stages.grpo import DiverseRL, ReasoningRL
from examples.r1.stages.rejection import RejectionSampling
from examples.r1.stages.reward_model import RewardModelStage
from examples.r1.stages.sft import ColdStart
from examples.r1.stages.stage import Stage

STAGES: dict[str, type[Stage]] = {
    stage.name: stage for stage in (ColdStart, ReasoningRL, RewardModelStage, RejectionSampling, DiverseRL)
}
"""In the order of the recipe."""


class Pipeline:
    """The stages of a run, one after the other, from the last checkpoint on if there is one to resume."""

    def __init__(self, run: Run, console: Console) -> None:
        self.run = run
        self.settings = run.settings
        self.console = console
        self.models = ModelFolder(run.settings, run.ranks)
        self.checkpoints = CheckpointFolder(run.settings.output / "checkpoint", run.ranks)
        self.progress = Progress()
        self.results: list[StageResult] = []

    def train(self) -> Stage:
        """Runs all stages of the settings; returns the last one."""
        if not self.settings.resume:
            self.checkpoints.clear()
        self.progress = self.checkpoints.load(self.settings) or self.progress
        if self.settings.resume:
            found = f"goes on after step {self.progress.steps_done} of {self.progress.stage}"
            none = f"no checkpoint in {self.checkpoints.folder}: starts from the beginning"
            self.console.print(found if self.progress.stage else none, highlight=False, soft_wrap=True)
        names = self.settings.stages
        first = names.index(self.progress.stage) if self.progress.stage else 0
        for name in names[first:]:
            start = perf_counter()
            stage = STAGES[name].start(self.run, self.models)
            if self.progress.stage == name:
                self.checkpoints.restore(stage)
            else:
                self.progress.stage, self.progress.steps_done = name, 0
                stage.begin()
                self.progress.facts[name] = stage.facts()
                self.progress.seconds[name] = perf_counter() - start
            self._run_stage(stage)
        self.results = [self._result(name) for name in names]
        return stage

    def _run_stage(self, stage: Stage) -> None:
        progress, settings = self.progress, self.settings
        records = progress.records.setdefault(stage.name, [])
        evaluations = progress.evaluations.setdefault(stage.name, [])
        start = perf_counter() - progress.seconds[stage.name]

        def save() -> None:
            progress.seconds[stage.name] = perf_counter() - start
            self.checkpoints.save(stage, progress, settings)

        if not evaluations:
            evaluations.append({"step": 0.0, **stage.evaluate()})
            save()  # what the stage began with, such as samples that it collected, is not made twice
            if self.must_stop():
                raise interrupted()
        with progress_bar(self.console, choices.STAGES[stage.name].title, stage.steps) as report:
            report(progress.steps_done, "")
            for index in range(progress.steps_done, stage.steps):
                records.append(stage.step(index))
                progress.steps_done = index + 1
                last = progress.steps_done == stage.steps
                if last or progress.steps_done % settings.evaluate_every == 0:
                    evaluations.append({"step": float(progress.steps_done), **stage.evaluate()})
                stop = self.must_stop()
                if not last and (stop or (settings.save_every and progress.steps_done % settings.save_every == 0)):
                    save()
                report(progress.steps_done, {**evaluations[-1], **records[-1]})
                if stop and not last:
                    raise interrupted()
        if not any(sample["stage"] == stage.name for sample in progress.samples):
            progress.samples += answers(stage)
        self.models.save(stage.name, stage.model)
        save()
        if self.must_stop():
            raise interrupted()

    def must_stop(self) -> bool:
        """Whether any rank was told to: all of them stop after the same step."""
        return self.run.ranks.any(stop_requested())

    def _result(self, name: str) -> StageResult:
        progress = self.progress
        return StageResult(
            name=name,
            title=choices.STAGES[name].title,
            steps=len(progress.records[name]),
            seconds=progress.seconds[name],
            records=progress.records[name],
            evaluations=progress.evaluations[name],
            facts=progress.facts[name],
        )
