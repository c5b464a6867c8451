"""Our CUDA C++ kernels on the CPU: what the public functions compute when they launch `csrc/*/cuda.cu`.

    with emulated(order=2):
        grpo_kernels.grpo_loss(...)  # CPU tensors

See docs/emulator.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor

from grpo_kernels import _dispatch, _extension
from grpo_kernels.testing import poisoned_allocations
from python_tests.emulator import build

ORDERS = (0, 1, 2, 3, 4)
"""Thread orders: forward, backward, and three random ones, with two to four blocks at once."""


@contextlib.contextmanager
def emulated(order: int = 0, module: ModuleType | None = None) -> Iterator[None]:
    """In the block, native kernels on CPU tensors are the CUDA kernels, and allocated memory is full of NaN.

    Ops that a GPU runs on Triton take the reference: some are composed with ops that have CUDA C++ kernels.

    Args:
        order: who runs when; see include/emulator.h. Read at each launch.
        module: the build to use; that of the sources if None.
    """
    kernels = build.module() if module is None else module

    def execution(tensor: Tensor) -> tuple[int, int]:
        if tensor.dtype == torch.float64:
            raise TypeError("the CUDA kernels do not take float64")
        return 0, 0

    registered = {
        op: dataclasses.replace(backends, cpu=("native",) if "native" in backends.cuda else ())
        for op, backends in _dispatch._registered.items()
    }
    with (
        mock.patch.object(_extension, "extension", return_value=kernels),
        mock.patch.object(_extension, "execution", execution),
        mock.patch.object(_extension, "cpu_problem", return_value=""),  # the package's own build is not needed
        mock.patch.dict(_dispatch._registered, registered),
        mock.patch.dict(_dispatch._resolved, clear=True),
        mock.patch.dict(os.environ, {"GK_EMULATOR_ORDER": str(order)}),
        poisoned_allocations(),
    ):
        yield
