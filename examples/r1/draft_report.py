"""What drafts were worth: rows of the table, figures for the JSON, a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from examples.r1.pipeline import TaskResult
from examples.r1.stage import Record

LATE = 10  # GRPO steps that the last figures are means of


def depths(result: TaskResult) -> int:
    """How many tokens the model drafts at a time; 0: none."""
    return result.model.config.mtp


def summary(result: TaskResult) -> dict[str, Any]:
    """For the JSON: acceptance and tokens per pass at the start and the end of GRPO, and the speed of sampling."""
    if depths(result) == 0 or result.draft_speed is None:
        return {}
    names = ["tokens_per_pass", *(f"acceptance_{depth}" for depth in range(1, depths(result) + 1))]
    first, last = _ends(result)
    figures = {name: {"first": _mean(first, name), "last": _mean(last, name)} for name in names}
    return {"drafts": figures | {"speed": result.draft_speed._asdict()}}


def rows(results: Sequence[TaskResult]) -> list[tuple[str, list[str]]]:
    """For the table: means over the first and the last GRPO steps."""
    summaries = [summary(result).get("drafts", {}) for result in results]
    if not summaries or not all(summaries):
        return []

    def change(name: str, form: str) -> list[str]:
        ends = [(found[name]["first"], found[name]["last"]) for found in summaries]
        return [" -> ".join("-" if end is None else f"{end:{form}}" for end in pair) for pair in ends]

    speeds = [found["speed"] for found in summaries]
    acceptance = [
        (f"drafts accepted, depth {depth}", change(f"acceptance_{depth}", ".3f"))
        for depth in range(1, max(depths(result) for result in results) + 1)
    ]
    return [
        *acceptance,
        ("tokens a pass of the model", change("tokens_per_pass", ".2f")),
        ("tokens/s, sampling with drafts", [f"{speed['tokens_per_second']:,.0f}" for speed in speeds]),
        ("  the same policy without", [f"{speed['tokens_per_second_without']:,.0f}" for speed in speeds]),
    ]


def plot(axes: Any, result: TaskResult) -> None:
    """Acceptance by depth and tokens a pass, of the samples of each GRPO step."""
    records = result.progress.records["grpo"]
    for depth in range(1, depths(result) + 1):
        values = [record.get(f"acceptance_{depth}", float("nan")) for record in records]
        axes.plot(values, label=f"accepted, depth {depth}", linewidth=1.2)
    axes.set(title=f"{result.task}: drafts", xlabel="GRPO step", ylim=(-0.03, 1.03))
    tokens = axes.twinx()
    tokens.plot([record.get("tokens_per_pass", 1.0) for record in records], "k--", label="tokens a pass", linewidth=1.0)
    tokens.set(ylim=(0.97, depths(result) + 1.03))
    lines = [*axes.lines, *tokens.lines]
    axes.legend(lines, [line.get_label() for line in lines], fontsize=8, loc="lower right")


def _ends(result: TaskResult) -> tuple[list[Record], list[Record]]:
    records = result.progress.records["grpo"]
    return records[:LATE], records[-LATE:]


def _mean(records: Sequence[Record], name: str) -> float | None:
    """None where no step has the figure: no draft of this depth was looked at."""
    values = [record[name] for record in records if name in record]
    return sum(values) / len(values) if values else None
