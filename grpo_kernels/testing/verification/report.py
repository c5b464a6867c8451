"""What a verification found: rows for a table, failures in words, one line that sums it up."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from grpo_kernels import _dispatch
from grpo_kernels.testing.verification.case import EVERY_DTYPE
from grpo_kernels.testing.verification.engine import Outcome, Target

PASSED, FAILED, NOT_AVAILABLE = "ok", "FAILED", "not available"


@dataclass(frozen=True)
class Row:
    """One or more checks; error, budget, case and tensor are of the one that fails or comes closest to failing."""

    op: str
    backend: str = ""
    device: str = ""
    dtype: str = ""
    cases: int = 0
    comparisons: int = 0
    error: float = 0.0
    budget: float = 0.0
    case: str = ""
    tensor: str = ""
    verdict: str = PASSED
    problem: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which knows no infinity: None stands for it."""
        values = dataclasses.asdict(self)
        return {name: None if value == math.inf else value for name, value in values.items()}

    def describe(self) -> str:
        """A failure in words."""
        where = [self.op, f"{self.backend} on {self.device}" if self.backend else "", self.dtype, self.case]
        return f"{'; '.join(part for part in where if part)}: {self.problem}"


@dataclass
class Report:
    """Collects outcomes; `without_cases` are ops that nobody wrote cases for, `unavailable` gives the reasons."""

    without_cases: list[str] = field(default_factory=list)
    unavailable: list[tuple[Target, str]] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)

    def rows(self, every_case: bool = False) -> list[Row]:
        """One row for each op, backend, device and dtype, or for each case of these; then what could not be checked."""
        groups: dict[tuple[Any, ...], list[Outcome]] = {}
        for outcome in self.outcomes:
            key = (outcome.target, outcome.dtype, outcome.case if every_case else "")
            groups.setdefault(key, []).append(outcome)
        rows = [_row(group) for group in groups.values()]
        for target, reason in self.unavailable:
            rows.append(Row(target.op, target.backend, str(target.device), verdict=NOT_AVAILABLE, problem=reason))
        ops = list(_dispatch.public_ops())
        dtypes = ["", *map(dtype_name, EVERY_DTYPE)]

        def order(row: Row) -> tuple[int, str, int, int]:
            place = 0 if every_case else dtypes.index(row.dtype)
            return ops.index(row.op), row.device, _dispatch.BACKENDS.index(row.backend), place

        rows.sort(key=order)
        return rows + [Row(op, verdict=FAILED, problem="this op has no cases") for op in self.without_cases]

    def failures(self) -> list[Row]:
        """Every case that failed, and every op without cases."""
        return [row for row in self.rows(every_case=True) if row.verdict == FAILED]

    def verified(self) -> bool:
        """Something was compared and nothing failed."""
        return bool(self.outcomes) and not self.failures()

    def summary(self, seconds: float) -> str:
        """The last line of the output."""
        backends = {outcome.target for outcome in self.outcomes}
        counts = (
            f"{len({target.op for target in backends})} ops, {len(backends)} backends, "
            f"{sum(outcome.comparisons for outcome in self.outcomes)} comparisons, {seconds:.0f} s"
        )
        missing = sorted({f"{target.backend} on {target.device}" for target, _ in self.unavailable})
        rest = f"; not available: {', '.join(missing)}" if missing else ""
        failures = self.failures()
        if failures:
            return f"FAILED: {len(failures)} of {len(self.outcomes) + len(self.without_cases)} checks; {counts}{rest}"
        return f"{'verified' if self.outcomes else 'FAILED: nothing to compare'}: {counts}{rest}"


def _row(outcomes: Iterable[Outcome]) -> Row:
    outcomes = list(outcomes)
    worst = max(outcomes, key=lambda outcome: outcome.severity)
    return Row(
        worst.target.op,
        worst.target.backend,
        str(worst.target.device),
        dtype_name(worst.dtype),
        len(outcomes),
        sum(outcome.comparisons for outcome in outcomes),
        worst.error,
        worst.budget,
        worst.case,
        worst.tensor,
        FAILED if worst.problem else PASSED,
        worst.problem,
    )


def dtype_name(dtype: torch.dtype) -> str:
    """As the user types it."""
    return str(dtype).removeprefix("torch.")
