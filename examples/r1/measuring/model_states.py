"""Bytes of model state that PPO and GRPO keep, and what the one saves of the other's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

PRECISIONS = ("float32", "mixed precision")
REWARD_MODEL = "reward model"
CLAIM = "about 50 %"  # of a white paper

# What is compared: a title, and whether PPO and GRPO hold a reward model.
COMPARISONS = (
    ("rewards by rules", False, False),
    ("reward model in both", True, True),
    ("reward model in PPO only", True, False),
)


class Row(NamedTuple):
    """Bytes that one model of a method keeps between two steps, each storage counted once."""

    precision: str
    method: str
    part: str
    parameters: int  # how many numbers
    weights: int
    gradients: int
    master_weights: int
    moments: int  # of Adam
    rest: int  # buffers, Adam's counters of steps

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.master_weights + self.moments + self.rest


class Allocation(NamedTuple):
    """All storages of a method on the device: as they were counted, and as its allocator has handed them out."""

    precision: str
    method: str
    counted: int
    allocated: int


class Saving(NamedTuple):
    """Bytes of both methods under one of the `COMPARISONS`."""

    precision: str
    comparison: str
    ppo: int
    grpo: int

    @property
    def share(self) -> float:
        """What GRPO saves of PPO's bytes."""
        return 1.0 - self.grpo / self.ppo


@dataclass(frozen=True)
class ModelStates:
    """The measurement: parameters, gradients, optimiser state and buffers of every model, and nothing else."""

    model: str
    device: str
    rows: tuple[Row, ...]
    allocations: tuple[Allocation, ...]

    def of(self, precision: str, method: str) -> dict[str, Row]:
        """The rows of a method by their part."""
        return {row.part: row for row in self.rows if (row.precision, row.method) == (precision, method)}

    def savings(self) -> list[Saving]:
        found = []
        for precision in PRECISIONS:
            for title, *has_reward_model in COMPARISONS:
                totals = (
                    sum(row.total for row in self.of(precision, method).values() if judged or row.part != REWARD_MODEL)
                    for method, judged in zip(("ppo", "grpo"), has_reward_model, strict=True)
                )
                found.append(Saving(precision, title, *totals))
        return found

    def as_json(self) -> dict[str, Any]:
        """All figures; what is saved follows from the rows, and stands there to be read."""
        return {
            "model": self.model,
            "device": self.device,
            "rows": [{**row._asdict(), "total": row.total} for row in self.rows],
            "allocations": [found._asdict() for found in self.allocations],
            "savings": [{**saving._asdict(), "share": saving.share} for saving in self.savings()],
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> ModelStates:
        """The inverse of `as_json`."""
        rows = (Row(**{name: row[name] for name in Row._fields}) for row in content["rows"])
        allocations = (Allocation(**found) for found in content["allocations"])
        return cls(content["model"], content["device"], tuple(rows), tuple(allocations))
