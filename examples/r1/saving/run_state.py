"""What a checkpoint holds beside its tensors: how far the run came, and with what settings; as JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import grpo_kernels
from examples.r1.results import Record
from examples.r1.saving.storage import CheckpointError
from examples.r1.settings import Settings

FORMAT = 2
STATE_FILE = "state.json"
REMEDY = "run without --resume to start anew"

# A resumed run may change these; of the stages, those that come after the checkpoint's.
_FREE_SETTINGS = {
    "output",
    "resume",
    "save_every",
    "device",
    "threads",
    "stages",
    "report",
    "compare_ppo",
    "compare_vocabulary",
    "expert_parallel",
}


class CheckpointMismatch(CheckpointError):
    """A run cannot go on from a checkpoint that other settings made."""


@dataclass
class Progress:
    """How far a run has come and what was seen on the way."""

    stage: str = ""
    steps_done: int = 0  # of the stage
    records: dict[str, list[Record]] = field(default_factory=dict)  # by stage, one per step
    evaluations: dict[str, list[Record]] = field(default_factory=dict)  # by stage, with their "step"
    facts: dict[str, Record] = field(default_factory=dict)  # by stage, of the stage as a whole
    seconds: dict[str, float] = field(default_factory=dict)  # by stage, evaluations and all
    samples: list[dict[str, Any]] = field(default_factory=list)  # completions to read, as in PipelineResult


@dataclass
class RunState:
    """The content of `state.json`."""

    tensors: str  # name of the tensor file
    sha256: str  # of its content
    settings: dict[str, Any]  # as JSON has them
    progress: Progress

    @classmethod
    def of(cls, tensors: str, sha256: str, settings: Settings, progress: Progress) -> RunState:
        return cls(tensors, sha256, _plain(settings), progress)

    def to_json(self) -> str:
        """NaN and infinities are kept: `json` reads back what it wrote, to the bit."""
        content = {"format": FORMAT, "version": grpo_kernels.__version__, **asdict(self)}
        return json.dumps({**content, "digest": _digest(content)})

    @classmethod
    def read(cls, path: Path) -> RunState:
        """Raises CheckpointError if the file is cut off, altered, or of another version of this example."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: is cut off or damaged ({error}); {REMEDY}") from error
        found = content.get("format") if isinstance(content, dict) else None
        if found != FORMAT:
            raise CheckpointError(f"{path}: has format {found!r}, and this program reads format {FORMAT}; {REMEDY}")
        if content.pop("digest", None) != _digest(content):
            raise CheckpointError(f"{path}: is damaged: its content is not what was written; {REMEDY}")
        progress = Progress(**content["progress"])
        return cls(content["tensors"], content["sha256"], content["settings"], progress)

    def check_settings(self, settings: Settings, folder: Path) -> None:
        """Raises CheckpointMismatch, which names what differs, if a run with these settings cannot go on from here."""
        wanted = comparable_settings(settings)
        found = {name: value for name, value in self.settings.items() if name not in _FREE_SETTINGS}
        changes = [
            f"{name} = {found.get(name, 'unknown')} (now {wanted.get(name, 'unknown')})"
            for name in sorted(wanted.keys() | found.keys())
            if name not in wanted or name not in found or wanted[name] != found[name]
        ]
        stages = self.settings["stages"]
        until = stages.index(self.progress.stage) + 1
        done, now = stages[:until], list(settings.stages[:until])
        if done != now:
            changes.append(f"stages {' '.join(done)} (now {' '.join(now)})")
        if changes:
            raise CheckpointMismatch(
                f"the checkpoint in {folder} was made with {', '.join(changes)}; "
                f"go on with the settings it was made with, or {REMEDY}"
            )


def comparable_settings(settings: Settings) -> dict[str, Any]:
    """What must be equal for a run to go on from a checkpoint, as JSON gives it back."""
    return {name: value for name, value in _plain(settings).items() if name not in _FREE_SETTINGS}


def saved_settings(folder: Path) -> dict[str, Any]:
    """The settings that the checkpoint in a folder was made with, for options that a resumed run does not name.

    Empty if there is no checkpoint. Raises CheckpointError if it is damaged.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        return {}
    found = RunState.read(path).settings
    known = {item.name for item in fields(Settings)} - {"output", "resume"}
    return {name: value for name, value in found.items() if name in known}


def _plain(settings: Settings) -> dict[str, Any]:
    """As JSON gives them back."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(settings), default=str))
    return plain


def _digest(content: Mapping[str, Any]) -> str:
    """Of the content without its digest, in whatever order."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
