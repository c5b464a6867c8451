"""Interleaved rounds of competing providers over rotating inputs, and the wall clock; cuda_clock.py has the GPU's."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from .case import Inputs, Provider, copy_inputs
from .machine import cache_bytes, free_bytes

_SHORTEST_ROUND = 2e-3  # seconds: well above the resolution of the clock and the cost of reading it
MAXIMUM_SETS = 96


@dataclass
class Runner:
    """A provider that is ready to be timed: `round()` runs it over inputs and returns seconds per call.

    Attributes:
        clock: what the seconds were read from.
        note: what a reader of the number has to know about it, or "".
        samples: seconds per call, one for each round so far.
        error: why it was given up during the rounds, or "".
    """

    provider: Provider
    round: Callable[[], float]
    clock: str
    note: str = ""
    samples: list[float] = field(default_factory=list)
    error: str = ""


def error_text(error: Exception) -> str:
    """The error on one line: CUDA's messages run over many."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def size_of(inputs: Inputs) -> int:
    """Bytes of all inputs."""
    return sum(t.numel() * t.element_size() for t in inputs.values())


def input_sets(inputs: Inputs, device: str, sets: int | None = None) -> list[Inputs]:
    """Copies of the inputs, together several times the cache, so that no call finds its data there. They take at most a
    quarter of the free memory, because what the providers allocate needs the rest.
    """
    size = max(size_of(inputs), 1)
    if sets is None:
        wanted = max(math.ceil(2 * cache_bytes(device) / size), 4 if device == "cuda" else 2)
        sets = max(min(wanted, MAXIMUM_SETS, free_bytes(device) // 4 // size), 1)
    return [inputs, *(copy_inputs(inputs) for _ in range(sets - 1))]


def restore(provider: Provider, sets: Sequence[Inputs], pristine: Inputs) -> None:
    """Writes the inputs that the provider destroys anew."""
    with torch.no_grad():
        for inputs in sets:
            for name in provider.overwrites:
                inputs[name].copy_(pristine[name])


def wall_runner(provider: Provider, sets: list[Inputs], pristine: Inputs, device: str) -> Runner:
    """Calls over rotating inputs on the wall clock; on CUDA only the enqueueing is timed."""

    def synchronize() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    provider.run(sets[0])
    restore(provider, sets[:1], pristine)
    synchronize()
    begin = time.perf_counter()
    provider.run(sets[0])
    synchronize()
    once = time.perf_counter() - begin
    calls = max(1, math.ceil(_SHORTEST_ROUND / max(once, 1e-7)))
    if provider.overwrites:
        calls = min(calls, len(sets))
    position = 0

    def measure() -> float:
        nonlocal position
        used = [sets[(position + i) % len(sets)] for i in range(calls)]
        position += calls
        restore(provider, used[: len(sets)], pristine)
        synchronize()
        begin = time.perf_counter()
        for inputs in used:
            provider.run(inputs)
        elapsed = time.perf_counter() - begin
        synchronize()
        return elapsed / calls

    return Runner(provider, measure, "wall clock")


def interleave(
    runners: Sequence[Runner], seconds: float, minimum: int, maximum: int, step: Callable[[str], None]
) -> None:
    """Collects samples. A round runs all runners, every other one in reverse, until the time is up and `minimum` rounds
    are done. A runner that raises is out of the following rounds, and says why.
    """
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        for count in range(maximum):
            if count >= minimum and time.perf_counter() > end:
                break
            for runner in runners if count % 2 == 0 else reversed(runners):
                if runner.error:
                    continue
                step(f"timing {runner.provider.name}")
                try:
                    runner.samples.append(runner.round())
                except Exception as error:
                    runner.error = error_text(error)
    finally:
        gc.enable()
