"""The rows of `sweep.py` as the tables of the example's page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from examples.r1.choices import GENERAL, REASONING, STAGES
from examples.r1.reporting.figures import duration, number

BEGIN, END = "<!-- combinations: begin -->", "<!-- combinations: end -->"
_POLICY_STAGES = tuple(stage for stage in STAGES if stage != "reward_model")


def between_markers(page: str, text: str) -> str:
    """The page with `text` between its markers. Raises ValueError if it does not have each marker once."""
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"the page needs one line {BEGIN} and one line {END}")
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{text.strip()}\n{END}{tail}"


def text(rows: Mapping[str, Any]) -> str:
    """Where it was measured, a table of the models and one of the losses; what was not run is not there."""
    whole = {name: row for name, row in rows.items() if "cold_start" in row["stages"]}
    losses = {name: row for name, row in rows.items() if name not in whole}
    parts = [_machines(rows)]
    if whole:
        parts.append(_table(_MODEL_HEAD, [_model_row(name, row) for name, row in whole.items()]))
    if losses:
        parts.append(_table(_LOSS_HEAD, [_loss_row(name, row) for name, row in losses.items()]))
    return "\n\n".join(parts)


def _machines(rows: Mapping[str, Any]) -> str:
    found = {
        f"{row['machine']['device']}, PyTorch {row['machine']['torch']}, {_threads(row['machine']['threads'])} a run"
        for row in rows.values()
    }
    return "; ".join(sorted(found)) + "."


def _threads(count: int) -> str:
    return "one thread" if count == 1 else f"{count} threads"


def _table(head: list[str], cells: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


_MODEL_HEAD = [
    "model",
    "parameters",
    "processor time",
    "1 cold start",
    "2 reasoning RL",
    "3 rejection sampling, SFT",
    "4 diverse RL",
]


def _model_row(name: str, row: Mapping[str, Any]) -> list[str]:
    """Greedy accuracies of both tasks after each stage."""
    stages = row["stages"]
    cells = [_accuracies(stages[stage]["after"]) if stage in stages else "" for stage in _POLICY_STAGES]
    return [_code(name), f"{row['parameters']:,}", duration(row["processor_seconds"]), *cells]


def _accuracies(look: Mapping[str, float]) -> str:
    return " / ".join(number(look.get(f"{task}/accuracy")) for task in (REASONING, GENERAL))


_LOSS_HEAD = [
    "reasoning RL of the dense model with",
    "processor time",
    "greedy",
    "sampled",
    "KL, nats",
    "largest ratio",
    "clipped",
]


def _loss_row(name: str, row: Mapping[str, Any]) -> list[str]:
    """Accuracies of the reasoning task, before and after; the rest is the mean of the last steps."""
    stage = row["stages"]["reasoning_rl"]
    cells = [
        f"{number(stage['before'].get(key))} -> {number(stage['after'].get(key))}"
        for key in (f"{REASONING}/accuracy", f"{REASONING}/sampled_accuracy")
    ]
    end = stage["end"]
    figures = [number(end.get("kl")), number(end.get("ratio_max"), 2), _share(end.get("clip_fraction"))]
    return [_code(name), duration(row["processor_seconds"]), *cells, *figures]


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _code(name: str) -> str:
    return f"`{name}`" if name.startswith("-") else name
