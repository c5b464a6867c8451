"""`python -m examples.r1.measuring.ppo_memory`: bytes of model state that PPO and GRPO keep, as really allocated."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.machine import describe
from examples.r1.choices import MODELS, RECIPES
from examples.r1.measuring.allocations import live_bytes
from examples.r1.measuring.ppo_step import METHODS, Part, Parts
from examples.r1.parallel import Ranks
from examples.r1.run import Run
from examples.r1.saving.storage import write_atomically
from examples.r1.settings import Settings

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
        """All figures. "ppo" and "grpo" are the bytes of their parts in float32, in which the example trains."""
        methods = {
            method: {part: row.total for part, row in self.of("float32", method).items()} for method in ("ppo", "grpo")
        }
        return {
            "model": self.model,
            "device": self.device,
            **methods,
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


def compare(run: Run) -> ModelStates:
    """Builds the models of both methods in both precisions, takes a step with each, and counts what is left.

    With several processes each may do it by itself: nothing is shared out, and nobody waits.
    """
    settings = replace(run.settings, expert_parallel=False)
    alone = replace(run, settings=settings, ranks=Ranks.single(run.device))
    rows: list[Row] = []
    allocations = []
    for precision in PRECISIONS:
        for method in METHODS:
            found, allocation = measure(alone, precision, method)
            rows += found
            allocations.append(allocation)
    return ModelStates(describe_model(settings), str(run.device), tuple(rows), tuple(allocations))


def measure(run: Run, precision: str, method: str) -> tuple[list[Row], Allocation]:
    """The rows of one method. What libraries allocate at their first use is not among its bytes."""
    mixed = precision != "float32"
    METHODS[method](replace(run, settings=replace(run.settings, layers=1)), mixed)
    parts, allocated = live_bytes(partial(METHODS[method], run, mixed), run.device)
    rows, seen = [], set[int]()
    for name, part in parts.items():
        kinds = states(part)
        numbers = sum(parameter.numel() for parameter in part.model.parameters())
        rows.append(Row(precision, method, name, numbers, **{kind: count(kinds[kind], seen) for kind in kinds}))
    return rows, Allocation(precision, method, _counted_on_device(parts, run.device), allocated)


def states(part: Part) -> dict[str, list[Tensor]]:
    """All tensors that a model keeps, by the columns of `Row`."""
    parameters = list(part.model.parameters())
    moments, counters = [], []
    for state in part.optimizer.state.values() if part.optimizer is not None else ():
        moments += [state["exp_avg"], state["exp_avg_sq"]]
        counters.append(state["step"])
    return {
        "weights": [parameter.detach() for parameter in parameters],
        "gradients": [parameter.grad for parameter in parameters if parameter.grad is not None],
        "master_weights": part.masters,
        "moments": moments,
        "rest": [*part.model.buffers(), *counters],
    }


def count(tensors: Iterable[Tensor], seen: set[int]) -> int:
    """Bytes of the storages that are not among those `seen`, which they join. A view brings all of its storage."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() > 0 and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def _counted_on_device(parts: Parts, device: torch.device) -> int:
    """Adam keeps its counters of steps on the CPU."""
    tensors = [tensor for part in parts.values() for kind in states(part).values() for tensor in kind]
    return count((tensor for tensor in tensors if tensor.device.type == device.type), set())


def describe_model(settings: Settings) -> str:
    words = [settings.model, f"width {settings.width}", _layers(settings.layers)]
    if settings.model == "moe":
        words.append(f"{settings.experts} experts")
    if settings.mtp:
        words.append(f"{_layers(settings.mtp)} of drafts")
    return ", ".join(words)


def _layers(count: int) -> str:
    return f"{count} layer" if count == 1 else f"{count} layers"


def table(states: ModelStates) -> Table:
    """A row a model, and what GRPO saves under each of the comparisons, for both precisions."""
    table = Table(
        title=f"Model state as allocated\n{states.model}",
        caption="bytes each: weights + gradients + master weights + moments",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    for name in ("parameters", "bytes each", "PPO MiB", "GRPO MiB", "saved"):
        table.add_column(name, justify="right", no_wrap=True)
    for precision in PRECISIONS:
        table.add_row(precision, style="bold")
        ppo, grpo = states.of(precision, "ppo"), states.of(precision, "grpo")
        for name, row in ppo.items():
            cells = (f"{row.parameters:,}", _per_parameter(row), _mebibytes(row.total))
            table.add_row(f"  {name}", *cells, _mebibytes(grpo[name].total) if name in grpo else "-", "")
        for saving in states.savings():
            if saving.precision == precision:
                sizes = _mebibytes(saving.ppo), _mebibytes(saving.grpo)
                table.add_row(f"  {saving.comparison}", "", "", *sizes, f"{saving.share:.1%}")
        table.add_section()
    return table


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


def _per_parameter(row: Row) -> str:
    kinds = (row.weights, row.gradients, row.master_weights, row.moments)
    return "+".join(f"{kind / row.parameters:g}" for kind in kinds if kind)


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.{3 if size < 100 * 2**20 else 1}f}"


def show(states: ModelStates, console: Console) -> None:
    """Prints the table, whether the allocator agrees, and the facts."""
    console.print(table(states))
    worst = max(abs(found.allocated - found.counted) for found in states.allocations)
    agreement = "the same bytes" if worst == 0 else f"at most {worst:,} bytes more, in its blocks"
    console.print(f"The allocator ({states.device}) has handed out {agreement}.", highlight=False)
    console.print(facts(states), highlight=False)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    default = Settings()
    parser = argparse.ArgumentParser(prog="python -m examples.r1.measuring.ppo_memory", description=__doc__)
    add = parser.add_argument
    add("--width", type=int, default=default.width, help="of the model (default: %(default)s)")
    add("--layers", type=int, default=default.layers, help="of the model (default: %(default)s)")
    add("--heads", type=int, default=default.heads, help="of the model (default: %(default)s)")
    add("--model", choices=MODELS, default=default.model, help="(default: %(default)s)")
    add("--experts", type=int, default=default.experts, help="of a layer of the MoE model (default: %(default)s)")
    add("--recipe", choices=RECIPES, default=default.recipe, help="of its experts' products (default: %(default)s)")
    add("--mtp", type=int, default=default.mtp, help="layers of multi-token prediction (default: %(default)s)")
    add("--device", default=default.device, help="cpu or cuda (default: %(default)s)")
    add("--threads", type=int, default=default.threads, help="of PyTorch, on a CPU (default: %(default)s)")
    add("--save", type=Path, metavar="FILE", help="the figures and the machine, as JSON")
    options = parser.parse_args(arguments)
    values = {name: value for name, value in vars(options).items() if name != "save"}
    try:
        options.settings = replace(default, **values)
    except ValueError as error:
        parser.error(str(error))
    return options


def main() -> int:
    options = parse_arguments()
    found = compare(Run.prepare(options.settings))
    show(found, Console())
    if options.save is not None:
        content = {"machine": describe(options.settings.device), **found.as_json()}
        write_atomically(options.save, json.dumps(content, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
