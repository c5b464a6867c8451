"""Checkpoints: tensors in safetensors, the rest in JSON, both written so that a crash leaves the last good one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from examples.r1.settings import Settings
from examples.r1.stage import Record, Stage

_FREE_SETTINGS = {"output", "tasks", "resume", "save_every", "device", "threads"}  # a resumed run may change these


@dataclass
class Progress:
    """How far a task has come and what was seen on the way."""

    stage: str = ""
    steps_done: int = 0
    records: dict[str, list[Record]] = field(default_factory=dict)  # by stage, one per step
    evaluations: dict[str, list[Record]] = field(default_factory=dict)  # by stage, with their "step"


def write_atomically(path: Path, text: str) -> None:
    """Writes a file in one move, so that a reader sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


class CheckpointMismatch(ValueError):
    """A run cannot go on from a checkpoint that other settings made."""


class CheckpointFolder:
    """The latest checkpoint of one task. `state.json` names the tensor file that it belongs to and is replaced last."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._state_file = folder / "state.json"

    def save(self, stage: Stage, progress: Progress, settings: Settings) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = self.folder / f"{progress.stage}-{progress.steps_done:06d}.safetensors"
        temporary = tensors.with_name(tensors.name + ".tmp")
        save_file(_stage_tensors(stage), temporary)
        os.replace(temporary, tensors)
        state = {"tensors": tensors.name, "settings": comparable_settings(settings), "progress": asdict(progress)}
        write_atomically(self._state_file, json.dumps(state))
        for old in self.folder.glob("*.safetensors"):
            if old != tensors:
                old.unlink()

    def clear(self) -> None:
        """Forgets an earlier run, so that a crash before the first save does not resume it."""
        self._state_file.unlink(missing_ok=True)

    def load(self, settings: Settings) -> Progress | None:
        """The saved progress, or None if there is none. Raises CheckpointMismatch when other settings made it."""
        if not self._state_file.exists():
            return None
        state = json.loads(self._state_file.read_text(encoding="utf-8"))
        wanted, found = comparable_settings(settings), {**comparable_settings(Settings()), **state["settings"]}
        changed = sorted(name for name in wanted if wanted[name] != found[name])
        if changed:
            changes = ", ".join(f"{name} = {found[name]} (now {wanted[name]})" for name in changed)
            raise CheckpointMismatch(f"the checkpoint in {self.folder} was made with {changes}")
        return Progress(**state["progress"])

    def restore(self, stage: Stage) -> None:
        """Puts the saved parameters and optimiser state into `stage`."""
        state = json.loads(self._state_file.read_text(encoding="utf-8"))
        tensors = load_file(self.folder / state["tensors"])
        for name, model in {"model": stage.model, **stage.frozen_models()}.items():
            model.load_state_dict(_with_prefix(tensors, f"{name}/"))
        names = [name for name, _ in stage.model.named_parameters()]
        moments = {
            index: _with_prefix(tensors, f"optimizer/{name}/")
            for index, name in enumerate(names)
            if f"optimizer/{name}/step" in tensors
        }
        groups = stage.optimizer.state_dict()["param_groups"]
        stage.optimizer.load_state_dict({"state": moments, "param_groups": groups})


def comparable_settings(settings: Settings) -> dict[str, Any]:
    """What must be equal for a run to go on from a checkpoint."""
    return {name: value for name, value in asdict(settings).items() if name not in _FREE_SETTINGS}


def _stage_tensors(stage: Stage) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, model in {"model": stage.model, **stage.frozen_models()}.items():
        tensors |= {f"{name}/{key}": value.contiguous() for key, value in model.state_dict().items()}
    for name, parameter in stage.model.named_parameters():
        moments = stage.optimizer.state.get(parameter, {})
        tensors |= {f"optimizer/{name}/{key}": value.contiguous() for key, value in moments.items()}
    return tensors


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
