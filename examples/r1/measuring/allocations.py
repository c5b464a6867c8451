"""What the allocator says: bytes that a piece of work leaves behind, and bytes that it needs at its peak."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch._C._profiler import _EventType
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

    The release of what was allocated before is no part of it. The profiler mostly has no size for it, but it keeps
    the sizes that an earlier profile saw by address, and the address may have gone to another tensor since.
    """
    gc.collect()
    with _silent_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    trace = profiler.profiler
    if trace is None:
        raise RuntimeError("the profiler has recorded nothing")
    events = _walk(trace.kineto_results.experimental_event_tree())
    allocations = [event for event in events if event.tag == _EventType.Allocation]
    changes, held = [], set()
    for event in sorted(allocations, key=lambda event: event.start_time_ns):
        address, size = event.extra_fields.ptr, event.extra_fields.alloc_size
        if size > 0:
            held.add(address)
        elif address in held:
            held.remove(address)
        else:
            continue
        changes.append(size)
    return result, changes


def _walk(events: Iterable[Any]) -> Iterator[Any]:
    for event in events:
        yield event
        yield from _walk(event.children)


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
