"""`python -m examples.r1.measuring.ppo_memory`: bytes of model state that PPO and GRPO keep, as really allocated."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from bench.machine import describe
from examples.r1.choices import MODELS, RECIPES
from examples.r1.measuring.allocations import live_bytes
from examples.r1.measuring.model_states import PRECISIONS, Allocation, ModelStates, Row
from examples.r1.measuring.ppo_step import METHODS, Part, Parts
from examples.r1.parallel import Ranks
from examples.r1.reporting import ppo_table
from examples.r1.run import Run
from examples.r1.saving.storage import save_json
from examples.r1.settings import Settings


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


def show(states: ModelStates, console: Console) -> None:
    """Prints the table, whether the allocator agrees, and the facts."""
    console.print(ppo_table.table(states))
    console.print(ppo_table.agreement(states), highlight=False)
    console.print(ppo_table.facts(states), highlight=False)


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
        save_json(options.save, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
