"""Clocks: interleaved rounds of competing providers, on the wall clock or on the device's own."""

from __future__ import annotations

import gc
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bench.case import Inputs, Provider, copy_inputs
from bench.machine import cache_bytes

_SHORTEST_ROUND = 2e-3  # seconds: well above the resolution of the clock and the cost of reading it
_MAXIMUM_SETS = 96


@dataclass
class Runner:
    """A provider that is ready to be timed: `round()` runs it `calls` times and returns seconds per call."""

    provider: Provider
    round: Callable[[], float]
    clock: str


def input_sets(inputs: Inputs, device: str, sets: int | None = None) -> list[Inputs]:
    """Copies of the inputs, together several times the cache, so that no call finds its data there."""
    size = sum(t.numel() * t.element_size() for t in inputs.values())
    if sets is None:
        wanted = math.ceil(2 * cache_bytes(device) / max(size, 1))
        sets = min(max(wanted, 4 if device == "cuda" else 2), _MAXIMUM_SETS)
    return [inputs, *(copy_inputs(inputs) for _ in range(sets - 1))]


def _restore(provider: Provider, sets: Sequence[Inputs], pristine: Inputs) -> None:
    with torch.no_grad():
        for inputs in sets:
            for name in provider.overwrites:
                inputs[name].copy_(pristine[name])


def _wall_runner(provider: Provider, sets: list[Inputs], pristine: Inputs, device: str) -> Runner:
    """Calls over rotating inputs on the wall clock; on CUDA only the enqueueing is timed."""

    def synchronize() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

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
        _restore(provider, used[: len(sets)], pristine)
        synchronize()
        begin = time.perf_counter()
        for inputs in used:
            provider.run(inputs)
        elapsed = time.perf_counter() - begin
        synchronize()
        return elapsed / calls

    return Runner(provider, measure, "wall clock")


def _graph_runner(provider: Provider, sets: list[Inputs], pristine: Inputs) -> Runner:
    """A CUDA graph of one call per set of inputs, timed with events: no launch gaps, no host."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            provider.run(sets[0])
    torch.cuda.current_stream().wait_stream(side)
    _restore(provider, sets, pristine)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for inputs in sets:
            provider.run(inputs)

    def measure() -> float:
        _restore(provider, sets, pristine)
        return _events(graph.replay) / len(sets)

    measure()
    return Runner(provider, measure, "CUDA graph")


def _events(work: Callable[[], None]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def _event_runner(provider: Provider, sets: list[Inputs], pristine: Inputs) -> Runner:
    """For what a graph cannot capture: events around the calls. Launch gaps count."""

    def work() -> None:
        for inputs in sets:
            provider.run(inputs)

    def measure() -> float:
        _restore(provider, sets, pristine)
        return _events(work) / len(sets)

    measure()
    return Runner(provider, measure, "CUDA events")


def runner(provider: Provider, sets: list[Inputs], pristine: Inputs, device: str, clock: str) -> Runner:
    """The provider, warmed up, on the clock that this case and device call for."""
    provider.run(sets[0])
    _restore(provider, sets[:1], pristine)
    if device != "cuda" or clock == "host":
        return _wall_runner(provider, sets, pristine, device)
    try:
        return _graph_runner(provider, sets, pristine)
    except RuntimeError as error:
        warnings.warn(f"{provider.name}: no CUDA graph ({error}); timed with events", stacklevel=2)
        torch.cuda.synchronize()
        return _event_runner(provider, sets, pristine)


def interleave(runners: Sequence[Runner], seconds: float, minimum: int, maximum: int) -> list[list[float]]:
    """Samples of every runner. A round runs all of them, every other one in reverse, until the time is up and `minimum`
    rounds are done.
    """
    samples: list[list[float]] = [[] for _ in runners]
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        for count in range(maximum):
            if count >= minimum and time.perf_counter() > end:
                break
            order = range(len(runners)) if count % 2 == 0 else reversed(range(len(runners)))
            for index in order:
                samples[index].append(runners[index].round())
    finally:
        gc.enable()
    return samples
