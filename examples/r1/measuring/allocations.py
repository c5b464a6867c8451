"""What the allocator says: bytes that a piece of work leaves behind, and bytes that it needs at its peak."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

Result = TypeVar("Result")


def live_bytes(work: Callable[[], Result], device: torch.device) -> tuple[Result, int]:
    """What `work` returns, and the bytes on the device that were allocated in it and are not freed at its end.

    On CUDA they are counted in the blocks that PyTorch hands out: 512 bytes, of large ones more.
    """
    if device.type == "cuda":
        gc.collect()  # what was dropped before shall not be freed, and counted, now
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        result = work()
        torch.cuda.synchronize(device)
        return result, torch.cuda.memory_allocated(device) - before
    result, changes = _cpu_changes(work)
    return result, sum(changes)


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most bytes on the device that `work` has allocated at a time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    level = peak = 0
    for change in _cpu_changes(work)[1]:
        level += change
        peak = max(peak, level)
    return peak


def _cpu_changes(work: Callable[[], Result]) -> tuple[Result, list[int]]:
    """What `work` returns, and the bytes of every allocation (positive) and its release (negative), in their order.

    What was allocated before has no size when it is released now, but for what an earlier profile saw: that is
    collected first.
    """
    gc.collect()
    with _silent_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    trace = profiler.profiler
    if trace is None:
        raise RuntimeError("the profiler has recorded nothing")
    memory = sorted((event for event in trace.kineto_results.events() if event.name() == "[memory]"), key=_start)
    return result, [event.nbytes() for event in memory]


def _start(event: Any) -> int:
    nanoseconds: int = event.start_ns()
    return nanoseconds


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Some builds of the profiler announce themselves on the process's standard error."""
    sys.stderr.flush()
    saved = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
