"""What the demonstration shows: one column for each way of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from examples.trl.settings import WAY_NAMES, Settings

_BARS = "▁▂▃▄▅▆▇█"
_POINTS = 16
Results = Mapping[str, Mapping[str, Any]]


def curve(values: Sequence[float]) -> str:
    """A line of bars for values in [0, 1], averaged over as many steps as a bar stands for."""
    size = -(-len(values) // _POINTS)
    groups = [values[start : start + size] for start in range(0, len(values), size)]
    means = [sum(group) / len(group) for group in groups]
    return "".join(_BARS[min(max(int(mean * len(_BARS)), 0), len(_BARS) - 1)] for mean in means)


def difference(values: Sequence[float], others: Sequence[float]) -> float:
    """The largest difference of two series, relative to the largest of the second."""
    largest = max(map(abs, others)) or 1.0
    return max(abs(value - other) for value, other in zip(values, others, strict=True)) / largest


def table(results: Results, settings: Settings) -> Table:
    stock = results["stock"]
    made = Table(
        title=f"{settings.samples} completions of {settings.tokens} tokens a step, vocabulary {settings.vocab:,}, "
        f"{settings.threads} threads"
    )
    made.add_column("")
    for way in results:
        made.add_column(WAY_NAMES[way], justify="right")

    def row(label: str, cells: Sequence[str]) -> None:
        made.add_row(label, *cells)

    for label, key, form in (
        ("seconds a step", "seconds", "{:.2f}"),
        ("  for the loss", "loss_seconds", "{:.2f}"),
        ("peak memory", "megabytes", "{:,.0f} MB"),
    ):
        row(label, [_against(form, result[key], stock[key], way == "stock") for way, result in results.items()])
    for label, key in (("losses", "losses"), ("gradient norms", "gradient_norms")):
        cells = ["-" if way == "stock" else f"{difference(r[key], stock[key]):.0e}" for way, r in results.items()]
        row(f"{label}, off by", cells)
    made.add_section()
    row("reward, learning", [curve(result["rewards"]) for result in results.values()])
    row("  first, last step", [f"{r['rewards'][0]:.2f} -> {r['rewards'][-1]:.2f}" for r in results.values()])
    return made


def _against(form: str, value: float, stock: float, is_stock: bool) -> str:
    return form.format(value) if is_stock else f"{form.format(value)} (1/{stock / value:.1f})"
