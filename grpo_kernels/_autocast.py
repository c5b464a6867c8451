"""Autocast, also where torch knows none: of meta tensors."""

from __future__ import annotations

import contextlib
from typing import Any

import torch


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast casts to there; None where it is off."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def no_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Turns it off."""
    return contextlib.nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)
