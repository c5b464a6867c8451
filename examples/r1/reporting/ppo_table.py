"""What PPO and GRPO keep in memory, as a table of the console and of the page."""

from __future__ import annotations

from typing import NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from examples.r1.measuring.model_states import CLAIM, PRECISIONS, ModelStates, Row
from examples.r1.reporting.figures import NOTHING, count, percent

COLUMNS = ("parameters", "bytes each", "PPO MiB", "GRPO MiB", "saved")


class Line(NamedTuple):
    """A model, or all models of a comparison, with a cell a column."""

    label: str
    cells: tuple[str, str, str, str, str]


def sections(states: ModelStates) -> dict[str, list[Line]]:
    """For both precisions: a line a model, then what GRPO saves under each of the comparisons."""
    return {precision: [*_models(states, precision), *_savings(states, precision)] for precision in PRECISIONS}


def table(states: ModelStates) -> Table:
    """The same for the console."""
    table = Table(title=Text(title(states)), caption=LEGEND, box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for precision, lines in sections(states).items():
        table.add_row(precision, style="bold")
        for line in lines:
            table.add_row(Text(f"  {line.label}"), *line.cells)
        table.add_section()
    return table


LEGEND = "bytes each: weights + gradients + master weights + moments"


def title(states: ModelStates) -> str:
    return f"Model state as allocated: {states.model}"


def agreement(states: ModelStates) -> str:
    """Whether the allocator counts the same."""
    worst = max((abs(found.allocated - found.counted) for found in states.allocations), default=0)
    words = "the same bytes" if worst == 0 else f"at most {worst:,} bytes more, in its blocks"
    return f"The allocator ({states.device}) has handed out {words}."


def facts(states: ModelStates) -> str:
    """The measured figures beside the claim, and what they do not hold."""
    by_rules, *_, mixed = (saving.share for saving in states.savings())
    return (
        f'A white paper says that GRPO needs "{CLAIM}" less memory than PPO. Measured here: {by_rules:.1%} as the '
        f"example trains, in float32 with rewards by rules; {mixed:.1%} in mixed precision if PPO holds a reward model "
        "and GRPO does not. No published paper gives a figure; DeepSeekMath says no more than that GRPO saves training "
        "resources. These bytes are model state: parameters, gradients, optimiser state. Activations, logits and the "
        "key-value cache are not among them; with long sequences and large vocabularies those can be the larger part."
    )


def _models(states: ModelStates, precision: str) -> list[Line]:
    grpo = states.of(precision, "grpo")
    return [
        Line(
            name,
            (
                count(row.parameters),
                _bytes_each(row),
                _mebibytes(row.total),
                _mebibytes(grpo[name].total) if name in grpo else NOTHING,
                "",
            ),
        )
        for name, row in states.of(precision, "ppo").items()
    ]


def _savings(states: ModelStates, precision: str) -> list[Line]:
    return [
        Line(saving.comparison, ("", "", _mebibytes(saving.ppo), _mebibytes(saving.grpo), percent(saving.share)))
        for saving in states.savings()
        if saving.precision == precision
    ]


def _bytes_each(row: Row) -> str:
    kinds = (row.weights, row.gradients, row.master_weights, row.moments)
    return "+".join(f"{kind / row.parameters:g}" for kind in kinds if kind)


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.{3 if size < 100 * 2**20 else 1}f}"
