"""What launchers of Triton kernels need to know and to prepare."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from grpo_kernels._extension import pointer

TILE = 256
"""Longest side of a tile of a matrix."""


class Matrix(NamedTuple):
    """Rows that are dense and do not overlap; or several such matrices, one behind the other."""

    tensor: Tensor
    stride: int  # of rows
    inner: int  # elements of a row
    matrix_stride: int = 0


def matrix(tensor: Tensor) -> Matrix:
    """A matrix as kernels read it, copied where its rows lie otherwise. Within a tile kernels count in 32 bits."""
    rows, width = tensor.shape
    sparse = rows > 1 and not width <= tensor.stride(0) < 2**31 // TILE
    if (width > 1 and tensor.stride(1) != 1) or sparse:
        tensor = tensor.contiguous()
    return Matrix(tensor, tensor.stride(0) if rows > 1 else width, width)


def loads(architecture: int, *matrices: Matrix) -> str:
    """How the rows can be read: "tma"; "vector", 16 bytes a thread; "scalar", an element a thread.

    Triton sees no smaller multiple of a stride than 16.
    """
    if any(pointer(of.tensor) % 16 for of in matrices):
        return "scalar"
    if architecture >= 90 and all(
        stride * of.tensor.element_size() % 16 == 0 for of in matrices for stride in (of.stride, of.matrix_stride)
    ):
        return "tma"
    numbers = [number for of in matrices for number in (of.stride, of.matrix_stride, of.inner)]
    return "vector" if all(number % 16 == 0 for number in numbers) else "scalar"


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


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Where kernels go to the device of a tensor."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def run(tensor: Tensor, launch: Callable[[], None]) -> None:
    """Launches there, and where Triton finds an allocator for its TMA descriptors.

    It looks in a context variable, which autograd's threads do not inherit; the copy leaves the caller's own alone.
    """

    def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8, device=tensor.device)

    def launch_there() -> None:
        triton.set_allocator(allocate)
        with on_device(tensor):
            launch()

    contextvars.copy_context().run(launch_there)
