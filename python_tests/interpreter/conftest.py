"""Triton's interpreter computes with numpy, whose products and exponentials have other bits on every processor, and
products even for every place of a row in its tile. Here they are exact but for the rounding of the result. Numbers that
the interpreter truncates to bfloat16 are rounded here, as on a GPU.

It also looks up the same things at every call of a function, which takes almost half of its time. Here it does so once.
"""

from __future__ import annotations

import functools
import inspect
import os
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import grpo_kernels
from grpo_kernels.testing import poisoned_allocations


def _matmul(a: np.ndarray, b: np.ndarray, dtype: Any = None) -> np.ndarray:
    if a.dtype.kind != "f" or b.dtype.kind != "f":
        return np.matmul(a, b, dtype=dtype)
    product = np.matmul(a.astype(np.float64), b.astype(np.float64))
    return product.astype(np.result_type(a, b) if dtype is None else dtype)


def _in_float64(name: str) -> Any:
    function = getattr(np, name)
    return lambda x: function(x, dtype=np.float64).astype(x.dtype)


def _exact_numpy() -> types.ModuleType:
    """The module numpy, but for functions of float32 that are computed in float64."""
    module = types.ModuleType("exact_numpy")
    module.__dict__.update(np.__dict__, matmul=_matmul)
    module.__dict__.update({name: _in_float64(name) for name in ("exp", "exp2", "log", "log2")})
    return module


@functools.cache
def _names_of_builtins(package: Any) -> list[str]:
    """What Triton replaces in a module or class while a kernel runs. Asked for the first time, nothing is replaced."""
    from triton.language import core

    return [name for name, member in inspect.getmembers(package) if core.is_builtin(member)]


def _patch_builtin(package: Any, builder: Any, scope: Any) -> None:
    """The interpreter's function of that name; of all members it looks at those that can be builtins."""
    from triton.language import core
    from triton.runtime import interpreter

    for name in _names_of_builtins(package):
        member = getattr(package, name)
        if core.is_builtin(member):
            interpreter._patch_attr(package, name, member, builder, scope)


def _found_once(find: Any) -> Any:
    """The interpreter's numpy dtype of a Triton type, which builds a table whenever it is asked."""
    from triton.language import core

    find = functools.cache(find)

    def of(kind: Any) -> np.dtype:
        element = kind.element_ty if isinstance(kind, core.block_type) else kind
        return np.dtype(np.uint64) if isinstance(element, core.pointer_type) else find(element)

    return of


def _rounded(convert: Any) -> Any:
    """The interpreter's conversion between floating types."""
    from triton.language import bfloat16, float32

    def call(data: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
        if source == float32 and target == bfloat16:
            values = torch.from_numpy(np.ascontiguousarray(data)).view(torch.float32)
            return values.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16).reshape(data.shape)
        found: np.ndarray = convert(data, source, target, mode)
        return found

    return call


@pytest.fixture
def triton_on_cpu() -> Iterator[None]:
    """Runs the test on Triton's kernels, with poison in memory that nobody has written."""
    with grpo_kernels.backend("triton"), poisoned_allocations():
        yield


if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime import interpreter

    interpreter.np = _exact_numpy()
    interpreter._get_np_dtype = _found_once(interpreter._get_np_dtype)
    interpreter._patch_builtin = _patch_builtin
    interpreter._convert_float = _rounded(interpreter._convert_float)
