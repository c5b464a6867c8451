"""What a run leaves behind, as plain figures, so that every report can be made again from `results.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.r1.measuring.model_states import ModelStates
from examples.r1.saving.storage import plain
from examples.r1.settings import Settings

if TYPE_CHECKING:
    from examples.r1.policy.model import CharTransformer

Record = dict[str, float]


@dataclass
class StageResult:
    """One stage: a record a step, an evaluation now and then (each with its "step", the first before any), facts."""

    name: str
    title: str
    steps: int = 0
    seconds: float = 0.0  # of the whole stage, evaluations and all
    records: list[Record] = field(default_factory=list)
    evaluations: list[Record] = field(default_factory=list)
    facts: Record = field(default_factory=dict)  # figures of the stage as a whole

    @property
    def before(self) -> Record:
        """The first evaluation; empty if there is none."""
        return self.evaluations[0] if self.evaluations else {}

    @property
    def after(self) -> Record:
        """The last evaluation; empty if there is none."""
        return self.evaluations[-1] if self.evaluations else {}

    def as_json(self) -> dict[str, Any]:
        content: dict[str, Any] = plain(self)
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> StageResult:
        return cls(
            name=str(content["name"]),
            title=str(content.get("title") or ""),
            steps=int(content.get("steps") or 0),
            seconds=_float(content.get("seconds", 0.0)),
            records=[_record(record) for record in content.get("records") or ()],
            evaluations=[_record(record) for record in content.get("evaluations") or ()],
            facts=_record(content.get("facts") or {}),
        )


@dataclass
class PipelineResult:
    """A whole run. Everything but the model goes into `results.json` and comes back from it.

    samples: completions to read, each {"stage": name, "task": name, "prompt": text, "completion": text,
    "correct": bool}: a few a task after each stage, the same held-out prompts each time, so that a reader sees one
    prompt's answer change.

    loss_step, large_loss_step, draft_speed: the fields of `LossStepComparison` and `DraftSpeed`.
    """

    settings: Settings
    parameters: int
    stages: list[StageResult] = field(default_factory=list)
    model: CharTransformer | None = None  # None in a result that was read from a file
    seconds: float = 0.0
    loss_step: Mapping[str, Any] | None = None
    large_loss_step: Mapping[str, Any] | None = None  # with a head of a real vocabulary, if that was asked for
    draft_speed: Mapping[str, Any] | None = None  # of a model that drafts
    ppo: ModelStates | None = None  # what PPO would keep in memory, if it was asked for
    samples: list[dict[str, Any]] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)  # hardware in general words, versions, processes

    def stage(self, name: str) -> StageResult | None:
        """The stage of that name, if it was part of the run."""
        return next((stage for stage in self.stages if stage.name == name), None)

    @property
    def final(self) -> Record:
        """The last evaluation of the policy; empty if there is none."""
        looks = (stage.after for stage in reversed(self.stages))
        return next((look for look in looks if any(name.endswith("/accuracy") for name in look)), {})

    def as_json(self) -> dict[str, Any]:
        """Everything but the model. What is no measurement of time or memory repeats exactly for equal settings.

        NaN and infinities become null, which JSON has, and come back as NaN.
        """
        kept = (item.name for item in fields(self) if item.name not in ("model", "stages", "ppo"))
        return {
            **{name: plain(getattr(self, name)) for name in kept},
            "ppo": None if self.ppo is None else self.ppo.as_json(),
            "stages": [stage.as_json() for stage in self.stages],
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> PipelineResult:
        """The inverse of `as_json`; what is missing, as in a file of an older version, gets its default."""
        if not isinstance(content, Mapping) or not isinstance(content.get("stages"), list):
            raise ValueError("these are not the results of a run of examples.r1: no list of stages")
        return cls(
            settings=_settings(content.get("settings") or {}),
            parameters=int(content.get("parameters") or 0),
            stages=[StageResult.from_json(stage) for stage in content["stages"]],
            seconds=_float(content.get("seconds", 0.0)),
            loss_step=content.get("loss_step"),
            large_loss_step=content.get("large_loss_step"),
            draft_speed=content.get("draft_speed"),
            ppo=ModelStates.from_json(found) if (found := content.get("ppo")) else None,
            samples=list(content.get("samples") or ()),
            machine=dict(content.get("machine") or {}),
        )


def _record(content: Mapping[str, Any]) -> Record:
    return {str(name): _float(value) for name, value in content.items()}


def _float(value: Any) -> float:
    return math.nan if value is None else float(value)


def _settings(content: Mapping[str, Any]) -> Settings:
    """Those that were written; what this version does not know is left out."""
    values: dict[str, Any] = {}
    for item in fields(Settings):
        value = content.get(item.name, item.default)
        if isinstance(value, str) and "Path" in str(item.type):
            value = Path(value)
        values[item.name] = tuple(value) if isinstance(value, list) else value
    return Settings(**values)
