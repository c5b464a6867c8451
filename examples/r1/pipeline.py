"""Takes one task through its stages, with evaluations and checkpoints on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console

from examples.r1 import draft_speed, loss_step
from examples.r1.checkpoint import CheckpointFolder, Progress
from examples.r1.draft_speed import DraftSpeed
from examples.r1.grpo import GRPOStage
from examples.r1.loss_step import LossStepComparison
from examples.r1.model import CharTransformer, ModelConfig, count_parameters
from examples.r1.progress_bar import progress_bar
from examples.r1.rollout import roll_out, stream_seed, torch_rng
from examples.r1.settings import Settings
from examples.r1.sft import SFTStage
from examples.r1.stage import Record, Stage
from examples.r1.tasks import TASKS, Problem, Task

StageFactory = Callable[[CharTransformer, Task, list[Problem], Settings], Stage]

STAGES: tuple[tuple[str, StageFactory], ...] = ((SFTStage.name, SFTStage), (GRPOStage.name, GRPOStage))


@dataclass
class TaskResult:
    """What a task's run leaves behind."""

    task: str
    parameters: int
    progress: Progress
    loss_step: LossStepComparison
    model: CharTransformer
    draft_speed: DraftSpeed | None = None  # of a model that drafts


def build_model(task: Task, settings: Settings) -> CharTransformer:
    """A fresh model for the task; its parameters depend on the seed and the task alone."""
    torch.manual_seed(stream_seed(settings.seed, task.name, "model"))
    config = ModelConfig(
        max_length=task.prompt_length + task.completion_length,
        width=settings.width,
        layers=settings.layers,
        heads=settings.heads,
        experts=settings.experts if settings.model == "moe" else 0,
        experts_per_token=settings.experts_per_token,
        shared_expert=settings.shared_expert,
        recipe=settings.recipe,
        aux_loss_coef=settings.aux_loss_coef,
        mtp=settings.mtp,
    )
    return CharTransformer(config).to(settings.device)


def evaluate(model: CharTransformer, task: Task, held_out: Sequence[Problem]) -> Record:
    """Greedy accuracy, format and language on held-out problems, and accuracy of samples at temperature 1."""
    greedy = roll_out(model, task, held_out)
    generator = torch_rng(model.head.weight.device, task.name, "evaluation")
    sampled = roll_out(model, task, held_out, generator=generator)
    record = {**greedy.means(), "sampled_accuracy": sampled.means()["accuracy"]}
    return record if sampled.drafts is None else record | sampled.drafts.record()


def prepare(name: str, settings: Settings) -> tuple[Task, list[Problem], CharTransformer]:
    """The task, its held-out problems and a fresh model."""
    if settings.device == "cpu":
        torch.set_num_threads(settings.threads)
    task = TASKS[name]()
    return task, task.held_out(settings.evaluation_prompts), build_model(task, settings)


def run_task(name: str, settings: Settings, console: Console) -> TaskResult:
    """All stages of one task; with `settings.resume`, from its last checkpoint on."""
    task, held_out, model = prepare(name, settings)
    folder = CheckpointFolder(settings.output / "checkpoints" / name)
    if not settings.resume:
        folder.clear()
    progress = folder.load(settings) or Progress(stage=STAGES[0][0])
    names = [stage_name for stage_name, _ in STAGES]
    for stage_name, make_stage in STAGES[names.index(progress.stage) :]:
        stage = make_stage(model, task, held_out, settings)
        if progress.stage == stage_name and progress.steps_done > 0:
            folder.restore(stage)
        else:
            progress.stage, progress.steps_done = stage_name, 0
        _run_stage(stage, progress, held_out, settings, folder, console)
    if not isinstance(stage, GRPOStage):
        raise RuntimeError("the last stage must be GRPO: the loss step is measured on its policy")
    comparison = loss_step.compare(stage, stage.steps)
    speed = None if model.mtp is None else draft_speed.compare(stage, stage.steps)
    return TaskResult(name, count_parameters(model), progress, comparison, model, speed)


def _run_stage(
    stage: Stage,
    progress: Progress,
    held_out: Sequence[Problem],
    settings: Settings,
    folder: CheckpointFolder,
    console: Console,
) -> None:
    records = progress.records.setdefault(stage.name, [])
    evaluations = progress.evaluations.setdefault(stage.name, [])

    def look(steps_done: int) -> None:
        figures = evaluate(stage.model, stage.task, held_out) | stage.validate()
        evaluations.append({"step": float(steps_done), **figures})

    if not evaluations:
        look(0)
    with progress_bar(console, f"{stage.task.name} {stage.name}", stage.steps) as report:
        report(progress.steps_done, "")
        for index in range(progress.steps_done, stage.steps):
            records.append(stage.step(index))
            progress.steps_done = index + 1
            last = progress.steps_done == stage.steps
            if last or progress.steps_done % settings.evaluate_every == 0:
                look(progress.steps_done)
            if last or (settings.save_every and progress.steps_done % settings.save_every == 0):
                folder.save(stage, progress, settings)
            report(progress.steps_done, _status(records[-1], evaluations[-1]))


def _status(record: Record, evaluation: Record) -> str:
    key = "reward" if "reward" in record else "loss"
    return f"{key} {record[key]:.3f}  held-out accuracy {evaluation['accuracy']:.3f}"
