"""A stage of the training example that trains in no time: it learns a line. For tests of checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from examples.r1.parallel import SINGLE
from examples.r1.results import Record
from examples.r1.saving.checkpoint import CheckpointFolder, Progress
from examples.r1.settings import Settings
from examples.r1.stages.stage import Stage

SETTINGS = Settings(stages=("cold_start", "reasoning_rl"))


class LineStage(Stage):
    """Learns a line from points, with a frozen copy of its start and data of its own."""

    name = "cold_start"

    @classmethod
    def start(cls, run: Any, models: Any) -> LineStage:
        return cls(run.settings)

    def __init__(self, settings: Settings, seed: int = 0) -> None:
        torch.manual_seed(seed)
        model: Any = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        model.mtp = None
        run: Any = SimpleNamespace(settings=settings, device=torch.device("cpu"), ranks=SINGLE)
        super().__init__(model, run, learning_rate=1e-2)
        self.reference: Any = copy.deepcopy(model)
        self.data = torch.randn(16, 3)

    def step(self, index: int) -> Record:
        rows = torch.randint(16, (8,), generator=torch.Generator().manual_seed(index))
        x = self.data[rows]
        loss = (self.model(x) - self.reference(x).detach() - x.sum(dim=1, keepdim=True)).square().mean()
        return {"grad_norm": self.descend(loss, index), "loss": float(loss.detach())}

    def frozen_models(self) -> dict[str, Any]:
        return {"reference": self.reference}

    def tensors(self) -> dict[str, Tensor]:
        return {"data": self.data, "kept": self.data[:, 0] > 0, "view": self.data[:, 1]}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self.data = tensors["data"]


def train_to(stage: Stage, progress: Progress, until: int) -> Progress:
    progress.stage = stage.name
    records = progress.records.setdefault(stage.name, [])
    for index in range(progress.steps_done, until):
        records.append(stage.step(index))
        progress.steps_done = index + 1
    return progress


def saved(folder: Path, steps: int = 3) -> CheckpointFolder:
    """A folder with a checkpoint after some steps."""
    checkpoints, stage = CheckpointFolder(folder), LineStage(SETTINGS)
    checkpoints.save(stage, train_to(stage, Progress(), steps), SETTINGS)
    return checkpoints
