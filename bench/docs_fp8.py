"""The tables of docs/fp8.md: measured bytes of weights and of what is kept for the backward."""

from __future__ import annotations

import textwrap
from typing import Any

from bench.docs_benchmarks import markdown

Row = dict[str, Any]
Record = dict[str, list[Row]]


def _less(size: float, other: float) -> str:
    """How much less than the other, in percent."""
    return f"{100 * (1 - size / other):.1f} % less"


def _range(texts: list[str]) -> str:
    """The least and the most of "x % less"."""
    found = sorted(texts, key=lambda text: float(text.split()[0]))
    return found[0] if found[0] == found[-1] else f"{found[0].split()[0]} to {found[-1]}"


def _models(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["model"] for row in rows))


def _weights(rows: list[Row]) -> tuple[list[list[str]], list[str]]:
    """The table, and how much less than fp32 the copy of a forward is."""
    table, less = [], []
    for model in _models(rows):
        of = {row["recipe"]: row for row in rows if row["model"] == model}
        wide, eight = of["fp32"]["parameter"], of["fp8"]
        less.append(_less(eight["copy"], wide))
        table.append(
            [
                model,
                *(f"{of[recipe]['parameter']:g}" for recipe in ("fp32", "bf16")),
                f"{eight['copy']:.4f}",
                less[-1],
                f"{eight['both_copies']:.4f}",
                _less(eight["both_copies"], wide),
            ]
        )
    return table, less


def _activations(rows: list[Row]) -> tuple[list[list[str]], list[str]]:
    """The table, and how much less than our fp32 FP8 keeps."""
    table, less = [], []
    for model in _models(rows):
        of = {(row["recipe"], row["save"]): row for row in rows if row["model"] == model}
        for save in ("preact", "input"):
            sizes = {recipe: of[recipe, save]["bytes_per_token"] for recipe in ("fp32", "bf16", "fp8")}
            less.append(_less(sizes["fp8"], sizes["fp32"]))
            table.append(
                [
                    f'{model}, `save="{save}"`',
                    *(f"{of[recipe, 'all']['bytes_per_token']:,}" for recipe in ("fp32", "bf16")),
                    *(f"{size:,}" for size in sizes.values()),
                    f"{sizes['fp8'] / of['fp8', save]['numbers']:.3f}",
                    less[-1],
                    _less(sizes["fp8"], sizes["bf16"]),
                ]
            )
    return table, less


_OF_WEIGHTS = (
    "bytes a weight", "fp32", "bf16", "FP8, for forwards", "than fp32", "FP8, for both passes", "than fp32",
)  # fmt: skip
_OF_ACTIVATIONS = (
    "bytes a token, kept for the backward", "eager fp32", "eager bf16", "fp32", "bf16", "FP8", "FP8, a number",
    "than fp32", "than bf16",
)  # fmt: skip


def text(record: Record) -> str:
    """The generated part of the page."""
    weights, of_copy = _weights(record["weights"])
    activations, of_kept = _activations(record["activations"])
    trained = next(row for row in record["weights"] if row["recipe"] == "fp8")
    together = trained["parameter"] + trained["both_copies"]
    words = (
        f"Against fp32, the copy of the weights for forwards takes {_range(of_copy)}, and what a layer keeps for its "
        f"backward {_range(of_kept)}. Training does not need less for weights: parameters stay, so that fp32 master "
        f"weights and both copies are {together:.4f} bytes a weight, and their gradient {trained['gradient']:g} more."
    )
    tables = [*markdown(_OF_WEIGHTS, weights), "", *markdown(_OF_ACTIVATIONS, activations), ""]
    return "\n".join([*tables, *textwrap.wrap(words, 120, break_on_hyphens=False)])
