"""Whether a call of an op may go past torch.library, because nobody there would see it.

The dispatcher costs a call with twenty arguments more than the kernels of a small batch do. It earns that wherever
something stands between the call and its kernel: fake and meta tensors, subclasses, functorch, modes, tracing, the
profiler. In eager execution over plain tensors nothing does.
"""

from __future__ import annotations

import torch
from torch import Tensor

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


def is_direct(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether torch.library would do nothing with an op of these tensors but call the implementation."""
    if not _EAGER or _dispatch_tls_local_include_set().raw_repr() not in _EAGER:
        return False
    if _has_torch_function(tensors) or _profiler_enabled():
        return False
    recorded = torch.is_grad_enabled()  # the library warns of a second derivative that an op does not have
    for tensor in tensors:
        if tensor is None:
            continue
        if recorded and tensor.requires_grad:
            return False
        if _dispatch_keys(tensor).raw_repr() not in _plain_keys and not _is_plain(tensor):
            return False
    return True


def _is_plain(tensor: Tensor) -> bool:
    """Whether the tensor has the keys of an ordinary one on its device; those of a negated or sparse one are others."""
    if tensor.device.type in ("cpu", "cuda"):
        for inference in (False, True):
            with torch.inference_mode(inference):
                _plain_keys.add(_dispatch_keys(torch.empty(0, device=tensor.device)).raw_repr())
    return _dispatch_keys(tensor).raw_repr() in _plain_keys
