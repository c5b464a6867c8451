"""Numbers as words, and means over steps that not all have the figure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from examples.r1.choices import TASKS
from examples.r1.results import Record, StageResult

NOTHING = "–"  # where there is no figure
WINDOW = 10  # steps that the figures of a stage's start and end are means of


def task_title(task: str) -> str:
    return TASKS[task].title if task in TASKS else task.replace("_", " ")


def finite(value: Any) -> float | None:
    """The number, or None for what is missing, no number, or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def mean(records: Iterable[Record], name: str) -> float | None:
    """Over the records that have the figure; None if none has."""
    found = [value for value in (finite(record.get(name)) for record in records) if value is not None]
    return sum(found) / len(found) if found else None


def ends(stage: StageResult, name: str) -> tuple[float | None, float | None]:
    """Means over the first and the last steps; of few steps, over the first and the last half."""
    having = [record for record in stage.records if name in record]
    size = max(1, min(WINDOW, len(having) // 2))
    return mean(having[:size], name), mean(having[-size:], name)


def total(records: Iterable[Record], name: str) -> float:
    return sum(finite(record.get(name)) or 0.0 for record in records)


def rate(records: Sequence[Record], *seconds: str) -> float | None:
    """Tokens a second of these times together; None where none were measured.

    Sampling alone counts all tokens that were sampled; anything else those that were trained on.
    """
    timed = [record for record in records if all(name in record for name in seconds)]
    spent = sum(total(timed, name) for name in seconds)
    tokens = total(timed, "sampled_tokens" if seconds == ("sample_seconds",) else "tokens")
    return tokens / spent if spent > 0 and tokens > 0 else None


def tasks_of(stages: Iterable[StageResult]) -> list[str]:
    """The tasks that were evaluated or sampled, in order of appearance."""
    names: dict[str, None] = {}
    for stage in stages:
        for record in (*stage.evaluations[:1], *stage.evaluations[-1:], *stage.records[:1], *stage.records[-1:]):
            names |= {key.rpartition("/")[0]: None for key in record if key.endswith("/accuracy")}
    return sorted(names, key=lambda name: list(TASKS).index(name) if name in TASKS else len(TASKS))


def number(value: Any, digits: int = 3) -> str:
    """A number near one: accuracy, reward, KL. Small ones keep two digits that say something."""
    found = finite(value)
    if found is None:
        return NOTHING
    if found != 0 and abs(found) < 0.5 * 10**-digits:
        return f"{found:.1e}"
    return f"{found:.{digits}f}"


def percent(value: Any) -> str:
    found = finite(value)
    if found is None:
        return NOTHING
    if 0 < abs(found) < 0.0005:
        return f"{found:.2%}" if abs(found) >= 0.00005 else f"{found:.0e}"
    return f"{found:.1%}"


def count(value: Any) -> str:
    """A whole number with separators."""
    found = finite(value)
    return NOTHING if found is None else f"{found:,.0f}"


def duration(value: Any) -> str:
    """Seconds in the unit that a reader wants."""
    found = finite(value)
    if found is None:
        return NOTHING
    if found >= 3600:
        return f"{int(found // 3600)} h {round(found % 3600 / 60):02d} min"
    if found >= 120:
        return f"{int(found // 60)} min {int(found % 60):02d} s"
    if found >= 10:
        return f"{found:.0f} s"
    return f"{found:.1f} s" if found >= 0.1 or found == 0 else f"{found * 1e3:.2f} ms"


def size(value: Any) -> str:
    """Bytes in a binary unit."""
    found = finite(value)
    if found is None:
        return NOTHING
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(found) >= scale:
            return f"{found / scale:.2f} {unit}"
    return f"{found:.0f} B"


def times(value: Any, other: Any) -> str:
    """How many times the second is in the first."""
    found, base = finite(value), finite(other)
    return NOTHING if found is None or not base else f"{found / base:.2f}x"


def worded(value: Any) -> str:
    """A setting or a description as it is read."""
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(worded, value)) or NOTHING
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {worded(item)}" for name, item in value.items()) or NOTHING
    return f"{value:g}" if isinstance(value, float) else str(value)
