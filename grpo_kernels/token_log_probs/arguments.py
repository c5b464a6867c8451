"""Checks of the arguments that every log-prob op takes beside its logits or its head."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from grpo_kernels import _checks
from grpo_kernels._token_ids import live_rows
from grpo_kernels.token_log_probs.layout import raise_outside

OUTPUTS = ("entropy", "sum_squared_probs", "top1_ids")


def check_transform(
    op: str, like: Tensor, like_name: str, leading: torch.Size, temperature: Tensor | float, logit_scale: float,
    softcap: float | None,
) -> None:  # fmt: skip
    """What stands between the logits and the softmax; a temperature per row has the shape `leading`."""
    if not isinstance(temperature, Tensor):
        if not torch.compiler.is_compiling():
            _checks.check_number(op, "temperature", temperature, above=0.0)
    else:
        if temperature.ndim > 0:
            _checks.check_shape(op, "temperature", temperature, ("[...]", leading))
        _checks.check_same_device(op, "temperature", temperature, like_name, like)
        _checks.check_dtype(op, "temperature", temperature)
        if temperature.requires_grad:
            raise ValueError(f"{op}: temperature is not differentiated; pass temperature.detach()")
    _checks.check_number(op, "logit_scale", logit_scale)
    if logit_scale == 0:
        raise ValueError(f"{op}: logit_scale must not be 0")
    if softcap is not None:
        _checks.check_number(op, "softcap", softcap, above=0.0)


def check_rows(
    op: str, like: Tensor, like_name: str, leading: torch.Size, ids_name: str, ids: Tensor, mask: Tensor | None
) -> None:
    """The ids and the mask have the shape `leading`."""
    if not isinstance(ids, Tensor) or ids.shape != leading or ids.device != like.device:
        _check_row_values(op, like, like_name, leading, ids_name, ids)
    _checks.check_dtype(op, ids_name, ids, _checks.INTEGER)
    if mask is not None:
        _check_row_values(op, like, like_name, leading, "mask", mask)


def _check_row_values(op: str, like: Tensor, like_name: str, leading: torch.Size, name: str, value: Any) -> None:
    _checks.check_tensor(op, name, value)
    _checks.check_shape(op, name, value, ("[...]", leading))
    _checks.check_same_device(op, name, value, like_name, like)


def check_outputs(op: str, outputs: Iterable[str]) -> tuple[bool, bool, bool]:
    """Which of `OUTPUTS` are wanted."""
    if isinstance(outputs, str):
        raise TypeError(f"{op}: outputs must be a collection of names, such as ({outputs!r},), got a str")
    if not isinstance(outputs, Iterable):
        raise TypeError(f"{op}: outputs must be a collection of names, got {type(outputs).__name__}")
    names = tuple(outputs)
    for name in names:
        if name not in OUTPUTS:
            _checks.check_choice(op, "outputs", name, OUTPUTS)
    return "entropy" in names, "sum_squared_probs" in names, "top1_ids" in names


def split_temperature(
    op: str, temperature: Tensor | float, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor | None, float]:
    """The pair (`Tensor? temperature_tensor`, `float temperature`) of the kernels."""
    if isinstance(temperature, Tensor):
        return temperature.detach().to(dtype), 0.0
    return _checks.scalar_argument(op, "temperature", temperature, device, dtype)


def raise_if_outside(op: str, ids: Tensor, mask: Tensor | None, vocab: int, name: str = "token_ids") -> None:
    """On the CPU, where looking is free: raises where the id of a live row is >= `vocab`."""
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    live = live_rows(ids, mask)
    outside = (live & (ids >= vocab)).reshape(-1)
    if outside.any():
        raise_outside(op, ids, int(outside.to(torch.uint8).argmax()), vocab, name)
