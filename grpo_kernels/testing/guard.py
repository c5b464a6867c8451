"""Guard bands: memory around a tensor that nobody may touch, so that an access out of bounds shows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from grpo_kernels._extension import pointer

BAND = 256  # bytes on each side, and the alignment of what lies between them
_WORD = -11  # 0xFFF5 in every 16 bits: NaN in float64, float32, bfloat16 and float16, a large negative integer
_ALLOCATORS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch, "zeros"),
    (torch, "zeros_like"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
    (torch.Tensor, "new_zeros"),
)
_REAL_EMPTY = torch.empty


class GuardBandError(AssertionError):
    """Memory before or after a tensor was overwritten."""


@dataclass(frozen=True)
class _Guarded:
    """A buffer whose bytes [begin, end) belong to a tensor; the others hold the pattern."""

    buffer: Tensor
    begin: int
    end: int
    what: str

    def faults(self) -> list[str]:
        """One line for each band that was written to."""
        pattern = _pattern(self.buffer.numel(), self.buffer.device)
        changed = self.buffer != pattern
        lines = []
        for side, band in (("before its start", changed[: self.begin]), ("after its end", changed[self.end :])):
            touched = band.nonzero()[:, 0]
            if touched.numel() == 0:
                continue
            near = self.begin - int(touched[-1]) if side.startswith("before") else int(touched[0]) + 1
            lines.append(f"{self.what}: {touched.numel()} bytes overwritten {side}, the nearest {near} away")
        return lines


_watched: list[_Guarded] | None = None


def _pattern(size: int, device: torch.device) -> Tensor:
    """[size] uint8."""
    words = torch.full(((size + 1) // 2,), _WORD, dtype=torch.int16, device=device)
    return words.view(torch.uint8)[:size]


def _guarded(like: Tensor, device: torch.device, what: str) -> Tensor:
    """A tensor with the shape, strides and dtype of `like`, full of the pattern, between two bands of it."""
    dims = zip(like.shape, like.stride(), strict=True)
    elements = 1 + sum((size - 1) * stride for size, stride in dims) if like.numel() else 0
    used = elements * like.element_size()
    buffer = _pattern(used + 3 * BAND + used % 2, device)
    begin = BAND + -pointer(buffer) % BAND
    if _watched is not None:
        _watched.append(_Guarded(buffer, begin, begin + used, what))
    # Not a view of the buffer: autograd treats views that a function returns in its own way.
    inside = _REAL_EMPTY(0, dtype=like.dtype, device=device)
    with torch.no_grad():
        inside.set_(buffer.untyped_storage(), begin // like.element_size(), like.shape, like.stride())
    return inside


def _caller() -> str:
    """Where the allocation was asked for: the nearest frame outside this folder and torch."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        path = frame.f_code.co_filename
        if Path(path).parent != Path(__file__).parent and "/torch/" not in path and not path.startswith("<"):
            break
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def _guarding(name: str, allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def allocate_guarded(*args: Any, **kwargs: Any) -> Tensor:
        source = args[0] if args and isinstance(args[0], Tensor) else None
        plain = kwargs.get("pin_memory") or kwargs.get("out") is not None or torch.compiler.is_compiling()
        if plain or type(source) not in (type(None), Tensor, torch.nn.Parameter):
            return allocate(*args, **kwargs)
        device = kwargs.get("device")
        if device is None:
            device = torch.get_default_device() if source is None else source.device
        device = torch.device(device)
        if device.type == "meta":
            return allocate(*args, **kwargs)
        like = allocate(*args, **{**kwargs, "device": "meta"})
        place = f"{name} {list(like.shape)} {str(like.dtype).removeprefix('torch.')}, made at {_caller()}"
        result = _guarded(like, device, place)
        if "zeros" in name:
            result.zero_()
        return result.requires_grad_(like.requires_grad)

    return allocate_guarded


@contextmanager
def guarded_allocations() -> Iterator[None]:
    """In the block, `torch.empty`, `torch.zeros` and their relatives return memory between guard bands.

    What they return starts at a multiple of 256 bytes and, unless it is zeroed, is full of NaN (integers: a large
    negative number). At the end every band is looked at, which waits for the device.

    Raises:
        GuardBandError: a band was overwritten; the message says of which allocation, and where.
    """
    global _watched
    previous, _watched = _watched, []
    try:
        with ExitStack() as patches:
            for owner, name in _ALLOCATORS:
                patches.enter_context(mock.patch.object(owner, name, _guarding(name, getattr(owner, name))))
            yield
        faults = [line for guarded in _watched for line in guarded.faults()]
        if faults:
            raise GuardBandError("\n".join(faults))
    finally:
        _watched = previous


def guard_input(tensor: Tensor) -> Tensor:
    """A copy between bands of NaN (integers: a large negative number): a read out of bounds shows in the result.

    The copy has the tensor's strides; elements between its rows, which belong to nobody, are NaN too. It is a leaf, and
    requires a gradient if `tensor` does. Inside `guarded_allocations` its bands are checked like the others.
    """
    values = tensor.detach()
    shape = list(values.shape)
    copy = _guarded(values, values.device, f"input {shape} {str(values.dtype).removeprefix('torch.')}")
    once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in values.stride())  # expanded axes
    copy[once].copy_(values[once])
    return copy.requires_grad_(tensor.requires_grad)
