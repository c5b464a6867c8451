"""Whether a call of an op may go past torch.library, because nobody there would see it, and past its checks, because
one like it has passed them.

The dispatcher costs a call with twenty arguments more than the kernels of a small batch do. It earns that wherever
something stands between the call and its kernel: fake and meta tensors, subclasses, functorch, modes, tracing, the
profiler. In eager execution over plain tensors nothing does. Neither do checks that look at types, devices and sizes
alone find in a call what they did not find in its like: `signature` says which calls are alike, `remember` keeps some.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from grpo_kernels import _extension

_Found = TypeVar("_Found")

_EAGER: tuple[int, ...] = ()
"""What a thread adds to the keys of every call, in inference mode and outside. A mode or transform adds its own."""

try:
    from torch._C import (
        DispatchKey,
        DispatchKeySet,
        _dispatch_keys,
        _dispatch_tls_local_include_set,
        _has_torch_function,
    )
    from torch._C._autograd import _profiler_enabled

    _INFERENCE = DispatchKeySet(DispatchKey.BackendSelect)
    _EAGER = (_INFERENCE.raw_repr(), (_INFERENCE | DispatchKeySet(DispatchKey.ADInplaceOrView)).raw_repr())
except (ImportError, AttributeError):  # names that PyTorch promises to nobody; without them no call is direct
    pass

_plain_keys: set[int] = set()
_MOST = 256
"""Calls that are remembered of an op: more than the shapes of a training step."""


def signature(tensors: tuple[Tensor | None, ...]) -> bytes | None:
    """What checks of arguments look at, of a call's tensors: which there are, their types, devices and sizes, and
    which want gradients; not their strides. None where somebody watches, or one of them is not plain."""
    if torch.compiler.is_compiling() or not _unwatched(tensors):
        return None
    return _extension.signature(tensors)


def recall(known: dict[Any, _Found], call: Any) -> _Found | None:
    """What the checks of such a call found; None where it is not known, or what it has cannot be looked up."""
    try:
        return known.get(call)
    except TypeError:
        return None


def remember(known: dict[Any, _Found], call: Any, found: _Found) -> None:
    """Keeps what the checks of a call found, under all that they looked at."""
    if len(known) >= _MOST:
        known.clear()
    known[call] = found


def is_direct(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether torch.library would do nothing with an op of these tensors but call the implementation."""
    if not _unwatched(tensors):
        return False
    recorded = torch.is_grad_enabled()  # the library warns of a second derivative that an op does not have
    if not recorded and _extension.signature(tensors) is not None:
        return True
    for tensor in tensors:
        if tensor is None:
            continue
        if recorded and tensor.requires_grad:
            return False
        if _dispatch_keys(tensor).raw_repr() not in _plain_keys and not _is_plain(tensor):
            return False
    return True


def _unwatched(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether no mode, transform or profiler stands between a call and its implementation."""
    if not _EAGER or _dispatch_tls_local_include_set().raw_repr() not in _EAGER:
        return False
    return not _has_torch_function(tensors) and not _profiler_enabled()


def _is_plain(tensor: Tensor) -> bool:
    """Whether the tensor has the keys of an ordinary one on its device; those of a negated or sparse one are others."""
    if tensor.device.type in ("cpu", "cuda"):
        for inference in (False, True):
            with torch.inference_mode(inference):
                _plain_keys.add(_dispatch_keys(torch.empty(0, device=tensor.device)).raw_repr())
    return _dispatch_keys(tensor).raw_repr() in _plain_keys
