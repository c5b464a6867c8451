"""Poisoned allocation: memory that a kernel forgot to write shows as NaN instead of passing by luck."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

_INTEGER_POISON = -(2**30)


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype.is_floating_point:
        return tensor.fill_(float("nan"))
    if tensor.dtype == torch.bool:
        return tensor.fill_(True)
    return tensor.fill_(_INTEGER_POISON if torch.iinfo(tensor.dtype).bits >= 32 else torch.iinfo(tensor.dtype).max)


def _poisoning(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocate_poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        return _poison(allocate(*args, **kwargs))

    return allocate_poisoned


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """In the block, `torch.empty` and its relatives, the tensor methods too, return memory full of NaN."""
    with (
        mock.patch.object(torch, "empty", _poisoning(torch.empty)),
        mock.patch.object(torch, "empty_like", _poisoning(torch.empty_like)),
        mock.patch.object(torch, "empty_strided", _poisoning(torch.empty_strided)),
        mock.patch.object(torch.Tensor, "new_empty", _poisoning(torch.Tensor.new_empty)),
        mock.patch.object(torch.Tensor, "new_empty_strided", _poisoning(torch.Tensor.new_empty_strided)),
    ):
        yield
