"""What the allocator says: bytes that a piece of work leaves behind, and bytes that it needs at its peak."""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

Result = TypeVar("Result")


def live_bytes(work: Callable[[], Result], device: torch.device) -> tuple[Result, int]:
    """What `work` returns, and the bytes on the device that were allocated in it and are not freed at its end.

    On CUDA they are counted in the blocks that PyTorch hands out: 512 bytes, of large ones more.
    """
    gc.collect()  # what was dropped before shall not be freed, and counted, now
    if device.type == "cuda":
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
    """What `work` returns, and the bytes of every allocation (positive) and release (negative), in their order."""
    with _silent_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    memory = sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"])
    return result, [event["args"]["Bytes"] for event in memory]


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
