"""The compiled module `_C`: loading it, and saying why it, or its CUDA half, cannot be used.

Where the time of a call matters, its bindings take tensors as they are, None for an absent one, and read their
addresses, types, sizes and strides themselves (csrc/bindings/tensor.h); others take addresses and numbers.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch  # before `_C`: both then share torch's OpenMP run time

DTYPE_CODE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # csrc/common/dtype.h
"""How the kernels number element types."""


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        module = importlib.import_module("grpo_kernels._C")
    except ImportError as error:
        return None, f"the extension is not built ({error})"
    module.set_tensor_type(torch.Tensor, False)
    return module, ""


@functools.cache
def extension() -> ModuleType:
    """The compiled module. Callers have resolved the backend to "native", so it is there."""
    module, problem = _load()
    if module is None:
        raise ImportError(f"grpo_kernels._C: {problem}")
    return module


def signature(tensors: tuple[torch.Tensor | None, ...]) -> bytes | None:
    """`_C.signature`; None without the extension."""
    module = _load()[0]
    found: bytes | None = None if module is None else module.signature(tensors)
    return found


def cpu_problem() -> str:
    """Why the native CPU kernels cannot run, or "" if they can."""
    return _load()[1]


@functools.cache
def cuda_problem(device: int) -> str:
    """Why the native CUDA kernels cannot run on CUDA device `device`, or "" if they can."""
    if torch.version.hip is not None:
        return "this is a ROCm build of torch"
    module, problem = _load()
    if module is None:
        return problem
    result: str = module.cuda_device_problem(device)
    return result


def execution(tensor: torch.Tensor) -> tuple[int, int]:
    """Where a kernel runs: (-1, number of threads) on the CPU, (ordinal, current stream) on CUDA."""
    if tensor.is_cpu:
        return -1, torch.get_num_threads()
    index = tensor.get_device()
    return index, torch._C._cuda_getCurrentRawStream(index)


def pointer(tensor: torch.Tensor | None) -> int:
    """Address of the data, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def fp8_tensor(data: torch.Tensor, scale: torch.Tensor) -> tuple[int, ...]:
    """csrc/common/fp8_tensor.h: Fp8Tensor, of [(E,) M, K] data and its scale; of [0] one that is not wanted."""
    if data.ndim == 1:
        return (0,) * 7
    batches = (data.stride(0), scale.stride(0)) if data.ndim == 3 else (0, 0)
    return (data.data_ptr(), batches[0], data.stride(-2), scale.data_ptr(), batches[1], *scale.stride()[-2:])
