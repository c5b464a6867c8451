"""The dtypes of matrix products, and products with float32 accumulation and a result of any dtype."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from grpo_kernels._autocast import autocast_dtype, no_autocast

_F = TypeVar("_F", bound=Callable[..., Any])
_HALF = (torch.bfloat16, torch.float16)


def gemm_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The operands' dtype of the products: autocast's, else the wider of the two."""
    autocast = autocast_dtype(hidden.device.type)
    if autocast is not None and torch.float64 not in (hidden.dtype, weight.dtype):
        return autocast
    return torch.promote_types(hidden.dtype, weight.dtype)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What products of this dtype are accumulated in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(function: _F) -> _F:
    """An implementation whose products keep the dtypes that they are given; its first argument names the device."""

    @functools.wraps(function)
    def call(hidden: Tensor, *arguments: Any) -> Any:
        with no_autocast(hidden.device.type):
            return function(hidden, *arguments)

    return call  # type: ignore[return-value]


def wide(value: Tensor) -> Tensor:
    """On the CPU half-width operands are widened: its products would otherwise round their results to that width."""
    return value.float() if value.dtype in _HALF and value.device.type == "cpu" else value


def multiply(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False, alpha: float = 1.0) -> None:
    """out = alpha * a @ b, or out += that. The product is rounded once, to the dtype of `out`.

    Args:
        out: [n, m] of any floating dtype.
        a: [n, k]. Of one dtype with b: float32, float64, or half-width on CUDA (on the CPU it is widened).
        b: [k, m].
    """
    a, b = wide(a), wide(b)
    beta = 1.0 if add else 0.0
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=beta, alpha=alpha, out=out)
    elif out.dtype == torch.float32 and a.dtype in _HALF:
        torch.addmm(out, a, b, beta=beta, alpha=alpha, out_dtype=torch.float32, out=out)
    else:
        product = torch.mm(a, b)
        out.add_(product, alpha=alpha) if add else out.copy_(product if alpha == 1.0 else product.mul_(alpha))
