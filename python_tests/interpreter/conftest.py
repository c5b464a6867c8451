"""Triton's interpreter computes with numpy, whose products and exponentials have other bits on every processor, and
products even for every place of a row in its tile. Here they are exact but for the rounding of the result."""

from __future__ import annotations

import os
from typing import Any

import numpy as np


class _ExactNumpy:
    """The module numpy, but for functions of float32 that are computed in float64."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    @staticmethod
    def matmul(a: np.ndarray, b: np.ndarray, dtype: Any = None) -> np.ndarray:
        if a.dtype.kind != "f" or b.dtype.kind != "f":
            return np.matmul(a, b, dtype=dtype)
        product = np.matmul(a.astype(np.float64), b.astype(np.float64))
        return product.astype(np.result_type(a, b) if dtype is None else dtype)

    @staticmethod
    def exp(x: np.ndarray) -> np.ndarray:
        return np.exp(x, dtype=np.float64).astype(x.dtype)

    @staticmethod
    def exp2(x: np.ndarray) -> np.ndarray:
        return np.exp2(x, dtype=np.float64).astype(x.dtype)

    @staticmethod
    def log(x: np.ndarray) -> np.ndarray:
        return np.log(x, dtype=np.float64).astype(x.dtype)

    @staticmethod
    def log2(x: np.ndarray) -> np.ndarray:
        return np.log2(x, dtype=np.float64).astype(x.dtype)


if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime import interpreter

    interpreter.np = _ExactNumpy()
