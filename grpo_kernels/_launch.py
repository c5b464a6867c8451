"""What launchers of Triton kernels that multiply matrices need to know and to prepare."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable

import torch
import triton
from torch import Tensor


def architecture(tensor: Tensor) -> int:
    """10 * major + minor of what the kernels are compiled for; 0 for what is not NVIDIA's."""
    if tensor.is_cuda:
        major, minor = torch.cuda.get_device_capability(tensor.device)
        return 0 if torch.version.hip else 10 * major + minor
    if triton.knobs.runtime.interpret:
        return 90
    found: int = triton.runtime.driver.active.get_current_target().arch
    return found


def precision(dtype: torch.dtype) -> str:
    """How kernels multiply operands of a dtype: float32 as three products of tf32."""
    if triton.knobs.runtime.interpret:
        return "interpreted"
    return "tf32x3" if dtype == torch.float32 and torch.version.hip is None else "ieee"


def programs(tensor: Tensor, items: int, on_each: int = 1) -> int:
    """How many programs share `items`: as many as run at a time, `on_each` multiprocessor. No result depends on it."""
    count = torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 3
    return min(count * on_each, items)


def run(tensor: Tensor, launch: Callable[[], None]) -> None:
    """Launches where Triton finds an allocator for its TMA descriptors.

    It looks in a context variable, which autograd's threads do not inherit; the copy leaves the caller's own alone.
    """

    def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8, device=tensor.device)

    def launch_there() -> None:
        triton.set_allocator(allocate)
        with torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext():
            launch()

    contextvars.copy_context().run(launch_there)
