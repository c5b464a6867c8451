"""Checks of the public functions' arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_kernels import _checks
from grpo_kernels.fp8_quantize.layout import DATA_DTYPE, TILE, tiles

BLOCKS = ((1, TILE), (TILE, TILE))
TRANSPOSES = (False, True, "both")
SMALLEST_EPS = 1e-30
"""Scales stay normal numbers, and so do their reciprocals."""


def check_quantize(op: str, x: Any, block: Any, power_of_two_scales: Any, transpose: Any, eps: Any) -> None:
    """Raises on a bad argument of fp8_quantize."""
    _checks.check_tensor(op, "x", x)
    _checks.check_dtype(op, "x", x)
    _checks.check_ndim(op, "x", x, "[M, K]", "[E, M, K]")
    check_options(op, power_of_two_scales, transpose, TRANSPOSES, eps)
    if not isinstance(block, (tuple, list)):
        raise TypeError(f"{op}: block must be (1, {TILE}) or ({TILE}, {TILE}), got {type(block).__name__}")
    _checks.check_choice(op, "block", tuple(block), BLOCKS)


def check_options(op: str, power_of_two_scales: Any, transpose: Any, transposes: tuple[Any, ...], eps: Any) -> None:
    """Raises on a bad option of an op that quantises."""
    if not isinstance(power_of_two_scales, bool):
        raise TypeError(f"{op}: power_of_two_scales must be a bool, got {type(power_of_two_scales).__name__}")
    if not isinstance(transpose, (bool, str)):
        raise TypeError(f"{op}: transpose must be a bool or 'both', got {type(transpose).__name__}")
    _checks.check_choice(op, "transpose", transpose, transposes)
    _checks.check_number(op, "eps", eps, minimum=SMALLEST_EPS, maximum=1.0)


def check_scaled(op: str, name: str, data: Any, scale: Any) -> None:
    """Data and scale of a quantised tensor: types, dtypes, shapes and devices; any tiles of 1 or 128 an axis."""
    for field, value, dtype in (("data", data, DATA_DTYPE), ("scale", scale, torch.float32)):
        _checks.check_tensor(op, f"{name}.{field}", value)
        _checks.check_dtype(op, f"{name}.{field}", value, (dtype,))
    _checks.check_ndim(op, f"{name}.data", data, "[M, K]", "[E, M, K]")
    _checks.check_same_device(op, f"{name}.scale", scale, f"{name}.data", data)
    if not scale_fits(data, scale):
        *batch, rows, width = data.shape
        wanted = [*batch, f"{rows} or {tiles(rows)}", f"{width} or {tiles(width)}"]
        text = ", ".join(map(str, wanted))
        raise ValueError(
            f"{op}: {name}.scale must have shape [{text}] for data {list(data.shape)}, got {list(scale.shape)}"
        )


def scale_fits(data: Tensor, scale: Tensor) -> bool:
    """Whether there is one scale for every element, or for every tile, along each of the last two axes."""
    if data.ndim != scale.ndim or data.shape[:-2] != scale.shape[:-2]:
        return False
    return all(scale.shape[axis] in (data.shape[axis], tiles(data.shape[axis])) for axis in (-2, -1))
