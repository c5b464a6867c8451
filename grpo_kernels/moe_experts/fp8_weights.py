"""Weights of experts in FP8, quantised once per optimizer step.

A copy is kept for as long as the weight is the same tensor, in the same memory, at the same version. The version alone
would not do: FSDP2, ZeRO and Megatron write parameters in ways that leave it as it was. They do so for a step of an
optimizer, so a step of any `torch.optim.Optimizer` drops all copies. Nothing here writes to a weight or refers to one
strongly.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary, WeakIdRef

from grpo_kernels import _extension
from grpo_kernels.fp8_quantize import ScaledTensor, ops
from grpo_kernels.moe_experts.fp8_stages import eps

_KINDS = (Tensor, nn.Parameter)
_TRACERS = tuple(torch._C._TorchDispatchModeKey.__members__.values())  # fake tensors, proxies, functional tensors


class _Copies(NamedTuple):
    """What is kept of one weight; never changed, only replaced."""

    stamp: tuple[Any, ...]
    storage: StorageWeakRef  # as long as it is held, no other storage gets the address in the stamp
    plain: ScaledTensor | None
    turned: ScaledTensor | None


class _Owned(NamedTuple):
    """Copies of a tensor and of its views: keyed by what the view takes of it."""

    pointer: int
    copies: dict[tuple[Any, ...], _Copies]


Reference = WeakIdRef

# Threads may meet here. Dictionaries change by single operations alone, so that the worst is a weight quantised twice.
_kept: Any = WeakIdKeyDictionary()  # Tensor, by identity -> _Owned
_cleared = 0
_watching = False
_unseen_steps = False


def quantized(weight: Tensor, backend: str, *, both: bool, saved: Reference | None = None) -> ScaledTensor:
    """The weight [E, N, K] in FP8, in blocks of 128 x 128 with scales that are powers of two.

    Args:
        weight: as the caller passed it, a view of a parameter too: of a detached copy nothing would be kept.
        backend: "native", "triton" or "reference", of the op fp8_quantize.
        both: `turned` will be asked for as well: where copies are kept, one read of the weight makes both.
        saved: in a backward, the `reference_to` the weight of the forward.
    """
    plain, _ = _copies(weight, _owner(weight, saved), backend, turn=False, both=both)
    return plain  # type: ignore[return-value]


def turned(weight: Tensor, backend: str, saved: Reference | None = None) -> ScaledTensor:
    """The transpose [E, K, N] of the weight in FP8: the same blocks, the same codes."""
    _, transposed = _copies(weight, _owner(weight, saved), backend, turn=True, both=False)
    return transposed  # type: ignore[return-value]


def reference_to(weight: Tensor) -> Reference | None:
    """What a backward finds the copies by when `ctx.saved_tensors` does not give the very tensor that was saved:
    `torch.utils.checkpoint` gives a detached one."""
    owner = _owner(weight, None)
    return None if owner is None else WeakIdRef(owner)


def clear_fp8_weight_cache() -> None:
    """Drops the FP8 copies of weights that `moe_experts(recipe="fp8_block128")` keeps between its calls.

    A weight is quantised anew after any in-place change that PyTorch counts, when its memory is another, and after
    `step()` of any `torch.optim.Optimizer`. Call this after anything else that writes weights: through `.data` or
    another tensor in the same memory, by a collective, by a kernel or a replayed CUDA graph of your own, by an
    optimizer that is no `torch.optim.Optimizer`, or, under FSDP2, into the shards by any means but an optimizer and
    `MoE.load_state_dict`. Call it, too, to get the memory of the copies back: at most two bytes for each number of the
    weights, which the next calls take again.
    """
    global _cleared
    _cleared += 1
    _kept.clear()


_Pair = tuple[ScaledTensor | None, ScaledTensor | None]


def _copies(weight: Tensor, owner: Tensor | None, backend: str, *, turn: bool, both: bool) -> _Pair:
    """The plain copy and the transposed one: at least the one that is asked for, the latter with `turn`.

    both: makes the two where neither is kept yet.
    """
    if owner is None:
        return _quantize(weight, backend, not turn, turn)
    place, stamp = _place(weight), _stamp(weight, owner, backend)
    found = _find(owner, place, stamp)
    plain, transposed = (found.plain, found.turned) if found is not None else (None, None)
    if (transposed if turn else plain) is None:
        _drop_moved()
        _watch_optimizers()
        cleared = _cleared
        with torch.inference_mode(False):  # copies made in it could not be used outside
            made = _quantize(weight, backend, not turn, turn or (both and found is None))
        plain, transposed = made[0] or plain, made[1] or transposed
        storage = StorageWeakRef(weight.untyped_storage())  # type: ignore[no-untyped-call]
        if cleared == _cleared:  # no other thread made a step meanwhile
            _keep(owner, place, _Copies(stamp, storage, plain, transposed))
    return plain, transposed


def _quantize(weight: Tensor, backend: str, rows: bool, columns: bool) -> _Pair:
    arguments = (weight.detach(), True, True, rows, columns, eps(gradient=False))
    outputs = ops.fp8_quantize(*arguments, backend)
    return ScaledTensor(*outputs[:2]) if rows else None, ScaledTensor(*outputs[2:]) if columns else None


def _owner(weight: Tensor, saved: Reference | None) -> Tensor | None:
    """The tensor with which copies of the weight are kept: itself, or what it is a view of, which lives on while the
    view may be another one in every call; or None.

    A change of it would be noticed. Of p.data and p.detach() nothing is kept: they may be held, and p written behind
    their back. What was `saved` for the backward may come back detached: then it is still what it was.
    """
    if torch.compiler.is_compiling() or _unseen_steps or type(weight) not in _KINDS:
        return None
    if weight.device.type not in ("cpu", "cuda") or weight.is_inference() or weight.is_neg() or _is_traced():
        return None
    if weight.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    was: Tensor | None = None if saved is None else saved()
    if was is not None and was.untyped_storage()._cdata == weight.untyped_storage()._cdata:
        return was
    owner = weight if weight._base is None else weight._base
    return owner if type(owner) is nn.Parameter or (type(owner) is Tensor and owner.requires_grad) else None


def _place(weight: Tensor) -> tuple[Any, ...]:
    return weight.storage_offset(), weight.shape, weight.stride(), weight.dtype


def _stamp(weight: Tensor, owner: Tensor, backend: str) -> tuple[Any, ...]:
    """What is the same for as long as the copies hold. On another CUDA stream they may not have been written yet."""
    stream = torch._C._cuda_getCurrentRawStream(weight.device.index) if weight.is_cuda else 0
    return weight.untyped_storage()._cdata, _extension.pointer(weight), owner._version, backend, stream


def _is_traced() -> bool:
    if torch._C._are_functorch_transforms_active():
        return True
    if torch._C._len_torch_dispatch_stack() == 0:
        return False
    return any(torch._C._get_dispatch_mode(key) is not None for key in _TRACERS)


def _find(owner: Tensor, place: tuple[Any, ...], stamp: tuple[Any, ...]) -> _Copies | None:
    """Copies that hold; those that do not are dropped, so that their memory is there for new ones."""
    owned: _Owned | None = _kept.get(owner)
    found = None if owned is None else owned.copies.get(place)
    if owned is not None and found is not None and found.stamp != stamp:
        owned.copies.pop(place, None)
        return None
    return found


def _watch_optimizers() -> None:
    global _watching
    if not _watching:
        _watching = True
        register_optimizer_step_post_hook(_after_step)


def _keep(owner: Tensor, place: tuple[Any, ...], copies: _Copies) -> None:
    pointer = _extension.pointer(owner)
    owned: _Owned | None = _kept.get(owner)
    if owned is None or owned.pointer != pointer:
        owned = _kept[owner] = _Owned(pointer, {})
    owned.copies[place] = copies


def _drop_moved() -> None:
    """Drops copies of weights whose memory was freed, or is elsewhere: a sharding library gathers one layer at a
    time, and the copies of all the others would stay."""
    for weak in _kept.keyrefs():
        owner, owned = weak(), _kept.data.get(weak)
        if owner is not None and owned is not None and owned.pointer != _extension.pointer(owner):
            _kept.pop(owner, None)


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Drops all copies. A step that is captured in a CUDA graph will run again unseen: from then on none are kept."""
    global _unseen_steps
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():  # type: ignore[no-untyped-call]
        _unseen_steps = True
    clear_fp8_weight_cache()


# What torch.compiler.disable does, without the import of torch._dynamo: a compiled step calls it and does not trace it.
_after_step._torchdynamo_disable = True  # type: ignore[attr-defined]
