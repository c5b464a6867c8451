"""The arguments of the loss that speak of depths: checked, and brought into one form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grpo_kernels import _checks
from grpo_kernels.token_log_probs.layout import raise_outside

NORMALIZERS = ("valid", "tokens")
_SHARE_OF_THE_OTHERS = 0.3


def stacked(op: str, hiddens: Tensor | Sequence[Tensor]) -> Tensor:
    """[D + 1, N, H] or [D + 1, B, T, H], of one tensor or of one for each depth."""
    name = "hiddens"
    if not isinstance(hiddens, Tensor):
        if not isinstance(hiddens, (list, tuple)) or not hiddens:
            found = type(hiddens).__name__
            raise TypeError(f"{op}: {name} must be a tensor, or a sequence of one tensor for each depth, got {found}")
        for depth, hidden in enumerate(hiddens):
            _checks.check_tensor(op, f"{name}[{depth}]", hidden)
            _checks.check_shape(op, f"{name}[{depth}]", hidden, ("of hiddens[0]", hiddens[0].shape))
            _checks.check_same_device(op, f"{name}[{depth}]", hidden, "hiddens[0]", hiddens[0])
            _checks.check_dtype(op, f"{name}[{depth}]", hidden, (hiddens[0].dtype,))
        _checks.check_ndim(op, f"{name}[0]", hiddens[0], "[N, H]", "[B, T, H]")
        hiddens = torch.stack(tuple(hiddens))
    _checks.check_ndim(op, name, hiddens, "[D + 1, N, H]", "[D + 1, B, T, H]")
    if hiddens.shape[0] == 0:
        raise ValueError(f"{op}: {name} must hold at least depth 0, got {list(hiddens.shape)}")
    if hiddens.shape[-1] == 0:
        raise ValueError(f"{op}: {name} must have shape [..., H] with H >= 1, got {list(hiddens.shape)}")
    return hiddens


def depth_weights_of(op: str, given: Any, depths: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """[D + 1] weights of the losses; DeepSeek-V3's where none are given: 1, and 0.3 shared by the others."""
    name = "depth_weights"
    if given is None:
        given = [1.0] + [_SHARE_OF_THE_OTHERS / max(depths - 1, 1)] * (depths - 1)
    if isinstance(given, Tensor):
        _checks.check_shape(op, name, given, ("[D + 1]", (depths,)))
        _checks.check_same_device(op, name, given, "hiddens", like)
        _checks.check_dtype(op, name, given)
        return given.detach().to(dtype)
    if not isinstance(given, (list, tuple)):
        raise TypeError(f"{op}: {name} must be a tensor or a sequence of numbers, got {type(given).__name__}")
    if len(given) != depths:
        raise ValueError(f"{op}: {name} must hold D + 1 = {depths} numbers, got {len(given)}")
    one = torch.ones((), dtype=dtype, device=like.device)  # a list as a tensor would be copied to the device
    if not torch.compiler.is_compiling():
        for depth, weight in enumerate(given):
            _checks.check_number(op, f"{name}[{depth}]", weight)
    return torch.stack([one * weight for weight in given])


def shares_of(op: str, counts: Tensor, normalizer: str, num_items: Tensor | float | None, dtype: torch.dtype) -> Tensor:
    """[D + 1]: one over what the sum of a depth is divided by."""
    _checks.check_choice(op, "normalizer", normalizer, NORMALIZERS)
    if num_items is not None:
        if isinstance(num_items, (int, float)) and not torch.compiler.is_compiling():
            _checks.check_number(op, "num_items", num_items, minimum=0.0)
        tensor, number = _checks.scalar_argument(op, "num_items", num_items, counts.device, dtype)
        items = torch.full_like(counts, number, dtype=dtype) if tensor is None else tensor.expand(counts.shape)
    else:
        items = (counts if normalizer == "valid" else counts[:1].expand(counts.shape)).to(dtype)
    return torch.ones((), dtype=dtype, device=counts.device) / items.clamp(min=1)


def raise_if_outside(op: str, targets: Tensor, token_ids: Tensor, shift: int, vocab: int) -> None:
    """On the CPU, where looking is free: raises where a token that a row predicts is >= `vocab`."""
    if targets.device.type != "cpu" or torch.compiler.is_compiling():
        return
    outside = (targets >= vocab).nonzero()
    if len(outside):
        depth, row = outside[0].tolist()
        raise_outside(op, token_ids, row + depth + shift, vocab)
